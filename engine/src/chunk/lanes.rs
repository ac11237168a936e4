//! BLAKE3 of many pages at once.
//!
//! ```text
//!               root
//!           parent  parent        one page: four chunks of 1 KiB,
//!          c0   c1 c2   c3        two parents, the root
//! ```
//!
//! The steps inside a chunk depend on each other, so one page keeps at most
//! four SIMD lanes busy, and its parents one. The same step of sixteen
//! pages fills sixteen lanes.
//!
//! Invariant: the hash is that of the plain crate, whatever the platform and
//! the number of pages. It is built on the crate's platform layer, which is
//! public but not promised to stay; the tests below compare the two.
//!
//! Invariant: no byte is read but those of the pages and of this module's own
//! arrays. The crate's AVX-512 and AVX2 code (1.8.7) loads up to 48 bytes behind
//! an input that another one follows in a set of two or four. In the crate
//! itself the other one lies there; behind a page the heap may end.

use std::sync::LazyLock;

use blake3::platform::{Platform, words_from_le_bytes_32};
use blake3::{BLOCK_LEN, CHUNK_LEN, IncrementCounter, OUT_LEN};

use super::Page;
use crate::id::ChunkId;
use crate::units::{PAGE_LEN, to_u64};

/// Pages hashed in one call: as many as the widest platform has lanes.
pub(crate) const LANES: usize = 16;

const CHUNKS: usize = PAGE_LEN / CHUNK_LEN;

/// Inputs in sets of this many are read to the byte on every platform; what is
/// left of them goes in smaller sets.
const EXACT: usize = 8;

// Domain flags, from table 3 of the BLAKE3 paper.
const CHUNK_START: u8 = 1;
const CHUNK_END: u8 = 1 << 1;
const PARENT: u8 = 1 << 2;
const ROOT: u8 = 1 << 3;
const DERIVE_KEY_MATERIAL: u8 = 1 << 6;

type Hash = [u8; OUT_LEN];
type Block = [u8; BLOCK_LEN];

/// What all chunks are hashed with.
struct Hasher {
    platform: Platform,
    key: [u32; 8],
}

static HASHER: LazyLock<Hasher> = LazyLock::new(|| Hasher::new(Platform::detect()));

/// The ids of pages, on this thread.
pub(super) fn hash_all(pages: &[&Page]) -> Vec<ChunkId> {
    HASHER.hash_all(pages)
}

impl Hasher {
    fn new(platform: Platform) -> Self {
        let key = blake3::hazmat::hash_derive_key_context(ChunkId::CONTEXT);
        Self { platform, key: words_from_le_bytes_32(&key) }
    }

    fn hash_all(&self, pages: &[&Page]) -> Vec<ChunkId> {
        let mut ids = Vec::with_capacity(pages.len());
        for group in pages.chunks(LANES) {
            let hashes = self.hash_group(group);
            ids.extend(hashes[..group.len()].iter().map(|hash| ChunkId::from_bytes(*hash)));
        }
        ids
    }

    /// Hashes one to [`LANES`] pages.
    fn hash_group(&self, pages: &[&Page]) -> [Hash; LANES] {
        let count = pages.len();
        let mut chunks = [[[0; OUT_LEN]; LANES]; CHUNKS];
        for (number, out) in chunks.iter_mut().enumerate() {
            self.chunks(number, pages, &mut out[..count]);
        }
        let [c0, c1, c2, c3] = &chunks;
        let mut left = [[0; OUT_LEN]; LANES];
        let mut right = [[0; OUT_LEN]; LANES];
        let mut roots = [[0; OUT_LEN]; LANES];
        self.parents(0, c0, c1, &mut left[..count]);
        self.parents(0, c2, c3, &mut right[..count]);
        self.parents(ROOT, &left, &right, &mut roots[..count]);
        roots
    }

    /// The chaining values of the chunk with this number in each page.
    fn chunks(&self, number: usize, pages: &[&Page], out: &mut [Hash]) {
        let mut inputs = [&[0; CHUNK_LEN]; LANES];
        for (input, page) in inputs.iter_mut().zip(pages) {
            *input = &page.as_chunks().0[number];
        }
        let inputs = &inputs[..out.len()];
        if number + 1 < CHUNKS {
            // Behind it is the next chunk of its page.
            return self.values(number, inputs, out);
        }
        let exact = inputs.len() / EXACT * EXACT;
        let (whole, rest) = inputs.split_at(exact);
        let (out, out_rest) = out.split_at_mut(exact);
        self.values(number, whole, out);
        if !rest.is_empty() {
            self.values_of_copies(number, rest, out_rest);
        }
    }

    /// The same for chunks behind which there may be nothing: behind each copy
    /// is the next one.
    fn values_of_copies(&self, number: usize, inputs: &[&[u8; CHUNK_LEN]], out: &mut [Hash]) {
        let mut copies = [[0; CHUNK_LEN]; EXACT];
        for (copy, input) in copies.iter_mut().zip(inputs) {
            *copy = **input;
        }
        self.values(number, &copies.each_ref()[..inputs.len()], out);
    }

    fn values(&self, number: usize, inputs: &[&[u8; CHUNK_LEN]], out: &mut [Hash]) {
        self.platform.hash_many(
            inputs,
            &self.key,
            to_u64(number),
            IncrementCounter::No,
            DERIVE_KEY_MATERIAL,
            CHUNK_START,
            CHUNK_END,
            out.as_flattened_mut(),
        );
    }

    /// The nodes above pairs of chaining values.
    fn parents(&self, flags: u8, left: &[Hash], right: &[Hash], out: &mut [Hash]) {
        // Behind each block is the next one.
        let mut blocks: [Block; LANES] = [[0; BLOCK_LEN]; LANES];
        for (block, (left, right)) in blocks.iter_mut().zip(left.iter().zip(right)) {
            let (head, tail) = block.split_at_mut(OUT_LEN);
            head.copy_from_slice(left);
            tail.copy_from_slice(right);
        }
        let inputs = blocks.each_ref();
        self.platform.hash_many(
            &inputs[..out.len()],
            &self.key,
            0,
            IncrementCounter::No,
            DERIVE_KEY_MATERIAL | PARENT | flags,
            0,
            0,
            out.as_flattened_mut(),
        );
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn platforms() -> Vec<Platform> {
        let mut all = vec![Platform::portable(), Platform::detect()];
        #[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
        all.extend([Platform::sse2(), Platform::sse41(), Platform::avx2()].into_iter().flatten());
        all
    }

    fn pages_of(seed: u64, count: usize) -> Vec<Page> {
        let mut reader = blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof();
        let mut pages = vec![[0; PAGE_LEN]; count];
        pages.iter_mut().for_each(|page| reader.fill(page));
        pages
    }

    fn check(pages: &[Page]) {
        check_each(&pages.iter().collect::<Vec<_>>());
    }

    fn check_each(pages: &[&Page]) {
        let expected: Vec<ChunkId> = pages.iter().map(|page| ChunkId::of(*page)).collect();
        assert_eq!(hash_all(pages), expected);
        for platform in platforms() {
            assert_eq!(Hasher::new(platform).hash_all(pages), expected, "{platform:?}");
        }
    }

    /// The same pages, each the last one before memory that nobody may read.
    #[expect(unsafe_code, reason = "only a mapping can end where a page does")]
    fn fenced(pages: &[Page]) -> Vec<&'static Page> {
        use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap_anonymous, mprotect};

        let (both, len) = (ProtFlags::READ | ProtFlags::WRITE, 2 * PAGE_LEN);
        let fence = |page: &Page| {
            // SAFETY: the kernel picks a range that nobody uses; it is never
            // given back.
            let start = unsafe {
                mmap_anonymous(std::ptr::null_mut(), len, both, MapFlags::PRIVATE).unwrap()
            };
            let second = start.wrapping_byte_add(PAGE_LEN);
            // SAFETY: the second half of that range, of which there is no
            // reference.
            unsafe { mprotect(second, PAGE_LEN, MprotectFlags::empty()).unwrap() }
            // SAFETY: the first half can be read and written, is aligned, and
            // nobody else knows of it.
            let fenced = unsafe { &mut *start.cast::<Page>() };
            *fenced = *page;
            &*fenced
        };
        pages.iter().map(fence).collect()
    }

    #[test]
    fn every_count_of_pages_gives_the_hashes_of_the_plain_crate() {
        (0..=3 * LANES + 1).for_each(|count| check(&pages_of(7, count)));
        check(&vec![[0; PAGE_LEN]; LANES + 1]);
        check(&vec![[0xff; PAGE_LEN]; 3]);
    }

    #[test]
    fn nothing_behind_a_page_is_read() {
        let pages = pages_of(8, 2 * LANES);
        let fenced = fenced(&pages);
        (0..=fenced.len()).for_each(|count| check_each(&fenced[..count]));
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn any_pages_give_the_hashes_of_the_plain_crate(
            seed in any::<u64>(),
            count in 1..3 * LANES,
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
        ) {
            let mut pages = pages_of(seed, count);
            for (at, byte) in changes {
                let at = at.index(count * PAGE_LEN);
                pages.as_flattened_mut()[at] = byte;
            }
            check(&pages);
        }
    }
}
