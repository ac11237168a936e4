//! What can go wrong, and what a caller can do about it.

use std::io;

use crate::id::{ChunkId, Name, NameError, PackId};

/// What a caller should do about an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The thing asked for does not exist.
    NotFound,
    /// The thing to be made exists already.
    Exists,
    /// Stored bytes are not what was written.
    Corrupt,
    /// It may work later or elsewhere: an input or output error, or a lock.
    Unavailable,
    /// The disk is full. Nothing that was committed is lost.
    NoSpace,
    /// The request makes no sense; ask for something else.
    Invalid,
    /// A flush failed; the store refuses writes until it is opened again.
    Fenced,
    /// A bug or an error of a library.
    Internal,
}

/// Why bytes are not a valid object of the format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// It ends before it should.
    #[error("it is cut short")]
    Short,
    /// It does not begin with the right magic.
    #[error("it does not begin with the expected magic")]
    Magic,
    /// A version that this program does not know.
    #[error("it has version {0}, which this program does not know")]
    Version(u32),
    /// Its checksum is wrong.
    #[error("its checksum does not match its bytes")]
    Checksum,
    /// A length or count is beyond the limit of the format.
    #[error("{what} is {value}, and the format allows at most {limit}")]
    TooLong {
        /// Which number.
        what: &'static str,
        /// What was found.
        value: u64,
        /// What is allowed.
        limit: u64,
    },
    /// A field has a value that the format does not know or allow.
    #[error("{0} has a value that the format does not allow")]
    Field(&'static str),
    /// The bytes did not decompress to what the header says.
    #[error("its bytes do not decompress to the stated length")]
    Decompress,
    /// The content hash is not the id under which it was looked up.
    #[error("its content has another hash than its id says")]
    Hash,
}

/// Any failure of a store.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A file operation failed.
    #[error("cannot {op} `{path}`")]
    Io {
        /// What was tried.
        op: &'static str,
        /// On which file of the store.
        path: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Reading the input or writing the output of an import or export failed.
    #[error("cannot {op}")]
    Transfer {
        /// What was tried.
        op: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Another process has the store open.
    #[error(
        "the store is in use by another process; use that one, stop it, or open the store for reading only"
    )]
    Locked,
    /// The directory holds something else.
    #[error("`{0}` is not a store; choose an empty or new directory")]
    NotAStore(String),
    /// A later program made the store.
    #[error("the store has format {found}, this program knows up to {known}; use a newer coppice")]
    NewerFormat {
        /// The store's format.
        found: u32,
        /// The newest that this program knows.
        known: u32,
    },
    /// No such name or id.
    #[error("there is no snapshot `{0}`")]
    NotFound(String),
    /// Several ids begin like this.
    #[error("several snapshots begin with `{0}`; give more digits")]
    Ambiguous(String),
    /// The name belongs to a snapshot already.
    #[error("the name `{0}` exists; remove it or choose another")]
    NameExists(Name),
    /// Not a name.
    #[error(transparent)]
    Name(#[from] NameError),
    /// A request that contradicts itself.
    #[error("{0}")]
    Invalid(&'static str),
    /// An image longer than the format allows.
    #[error("an image of {0} bytes is longer than the format allows (16 TiB)")]
    ImageTooLong(u64),
    /// Pages must come in ascending order and inside the image.
    #[error("page {page} cannot be written here: the next free one is {next} of {pages}")]
    PageOrder {
        /// The first page of the refused write.
        page: u64,
        /// The lowest page that may still be written.
        next: u64,
        /// Pages of the image.
        pages: u64,
    },
    /// Part of a pack is not what was written.
    #[error("pack {pack} is damaged at offset {offset}: {source}")]
    Damaged {
        /// Which pack.
        pack: PackId,
        /// Where in it.
        offset: u64,
        /// How.
        #[source]
        source: FormatError,
    },
    /// Verified bytes of an object are not a valid object.
    #[error("the {what} {id} is not valid: {source}")]
    BadObject {
        /// What kind of object.
        what: &'static str,
        /// Its id.
        id: String,
        /// How.
        #[source]
        source: FormatError,
    },
    /// An object is in no pack.
    #[error("the {what} {id} is in no pack of the store; run `coppice check`")]
    Missing {
        /// What kind of object.
        what: &'static str,
        /// Its id.
        id: String,
    },
    /// A pack was collected while it was looked for, or since the store was
    /// opened for reading only; what is still needed of it lies in another
    /// pack now.
    #[error("pack {pack} was collected meanwhile; try again")]
    Retired {
        /// Which pack.
        pack: PackId,
    },
    /// A qcow2 file that cannot be imported.
    #[error(transparent)]
    Qcow2(#[from] Qcow2Error),
    /// A chunk could not be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The root log has a bad entry before its end.
    #[error(
        "the root log is damaged at offset {offset}: {source}; move the file `roots.log` aside and the catalog is rebuilt from the packs"
    )]
    RootLog {
        /// Where.
        offset: u64,
        /// How.
        #[source]
        source: FormatError,
    },
    /// The index failed.
    #[error("the index failed: {0}; `coppice rebuild-index` builds it again from the packs")]
    Index(String),
    /// The store was opened for reading only.
    #[error("the store is open for reading only, and this would change it")]
    ReadOnly,
    /// A flush failed earlier.
    #[error(
        "an earlier flush to disk failed, so the store takes no writes until it is opened again"
    )]
    Fenced,
    /// The counts of references do not add up; they are taken anew.
    #[error("the counts of references do not add up; run it again")]
    Ledger,
}

/// Why a page could not be had.
#[derive(Debug, thiserror::Error)]
#[error("chunk {chunk} in pack {pack} at offset {offset} cannot be read: {cause}")]
pub struct ReadError {
    /// The chunk that was asked for.
    pub chunk: ChunkId,
    /// Its pack.
    pub pack: PackId,
    /// Offset of its frame in the pack.
    pub offset: u64,
    /// Why.
    #[source]
    pub cause: ReadCause,
}

/// The reason of a [`ReadError`].
#[derive(Debug, thiserror::Error)]
pub enum ReadCause {
    /// The chunk is in no pack: it was lost in a repair.
    #[error("it is in no pack any more; ingest the same bytes again")]
    Lost,
    /// The pack was never handed to the reader.
    #[error("the pack is not open")]
    UnknownPack,
    /// The file could not be read.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The bytes are not what was written.
    #[error("{0}")]
    Format(#[from] FormatError),
    /// The frame is sound and holds another chunk.
    #[error("its bytes have the hash {found}")]
    Mismatch {
        /// The hash of the bytes that are there.
        found: ChunkId,
    },
}

impl ReadError {
    /// What a caller should do.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match &self.cause {
            ReadCause::UnknownPack => ErrorKind::Unavailable,
            ReadCause::Io(source) => kind_of_io(source),
            ReadCause::Lost | ReadCause::Format(_) | ReadCause::Mismatch { .. } => {
                ErrorKind::Corrupt
            }
        }
    }
}

impl StoreError {
    /// What a caller should do.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Io { source, .. } | Self::Transfer { source, .. } => kind_of_io(source),
            Self::Locked | Self::Retired { .. } => ErrorKind::Unavailable,
            Self::NotFound(_) => ErrorKind::NotFound,
            Self::NameExists(_) => ErrorKind::Exists,
            Self::NotAStore(_)
            | Self::NewerFormat { .. }
            | Self::Ambiguous(_)
            | Self::Qcow2(_)
            | Self::Name(_)
            | Self::Invalid(_)
            | Self::ReadOnly
            | Self::ImageTooLong(_)
            | Self::PageOrder { .. } => ErrorKind::Invalid,
            Self::Damaged { .. }
            | Self::BadObject { .. }
            | Self::Missing { .. }
            | Self::RootLog { .. } => ErrorKind::Corrupt,
            Self::Read(error) => error.kind(),
            Self::Index(_) | Self::Ledger => ErrorKind::Internal,
            Self::Fenced => ErrorKind::Fenced,
        }
    }

    /// Says on which file of the store an operation failed; for `map_err`.
    pub(crate) fn io(op: &'static str, path: &str) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { op, path, source }
    }

    /// Says which transfer failed; for `map_err`.
    pub(crate) fn transfer(op: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Transfer { op, source }
    }
}

fn kind_of_io(error: &io::Error) -> ErrorKind {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ErrorKind::NoSpace,
        io::ErrorKind::UnexpectedEof => ErrorKind::Corrupt,
        _ => ErrorKind::Unavailable,
    }
}

/// Why a qcow2 file cannot be imported.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Qcow2Error {
    /// A field of the header is wrong.
    #[error("the file is no sound qcow2 image: its {0} is wrong")]
    Header(&'static str),
    /// It is written over another file.
    #[error(
        "the qcow2 image is written over `{0}`: give that file with `--backing PATH`, or merge them with `qemu-img convert -O qcow2 IMAGE NEW` and import that"
    )]
    Backing(String),
    /// More backing files are given than there are places for.
    #[error(
        "a backing file is given, but the image above it is not written over another: leave it out"
    )]
    NotOver,
    /// A file is over itself.
    #[error(
        "the qcow2 image and its backing files must be different files, and one is given twice"
    )]
    Loop,
    /// Too many files over each other.
    #[error("more than {max} backing files: merge some with `qemu-img convert`")]
    ChainTooLong {
        /// How many there may be.
        max: usize,
    },
    /// It uses what this reader does not know.
    #[error(
        "the qcow2 image uses {0}, which cannot be imported: `qemu-img convert -O raw IMAGE NEW` may help"
    )]
    Unsupported(String),
    /// It names something outside the file.
    #[error("the qcow2 image is damaged: {what} at byte {offset} is not in the file")]
    Outside {
        /// What it names.
        what: &'static str,
        /// Where it should be.
        offset: u64,
    },
    /// Two parts of the disk lie in one place.
    #[error("the qcow2 image is damaged: the cluster at byte {offset} is used twice")]
    UsedTwice {
        /// Which cluster.
        offset: u64,
    },
    /// A compressed cluster does not decompress.
    #[error("the qcow2 image is damaged: the compressed cluster at byte {offset} cannot be read")]
    Compressed {
        /// Which cluster.
        offset: u64,
    },
    /// More compressed clusters than the file can hold.
    #[error("the qcow2 image is damaged: it names more compressed clusters than it can hold")]
    TooMuchCompressed,
}
