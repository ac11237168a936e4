//! Reading blocks of 4 KiB at random: which ones, and reading them from files
//! that a program has mounted.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// Length of a block.
pub(super) const BLOCK: u64 = 4096;
/// Blocks of each file.
pub(super) const PER_FILE: usize = 200;
/// Offsets of blocks in each file.
pub(super) type Drawn = BTreeMap<PathBuf, Vec<u64>>;
/// How often a block that is all zeros is drawn again.
const DRAWS_MAX: usize = 200;

/// Offsets in each file, in no order; blocks of zeros only where there is
/// little else.
pub(super) fn draw(files: &[PathBuf]) -> Result<Drawn> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut drawn = BTreeMap::new();
    for path in files {
        let file = File::open(path).with_context(|| format!("no {}", path.display()))?;
        let blocks = file.metadata()?.len() / BLOCK;
        let mut offsets = Vec::new();
        for _ in 0..PER_FILE.min(usize::try_from(blocks)?) {
            let mut offset = 0;
            for _ in 0..DRAWS_MAX {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                offset = state % blocks * BLOCK;
                let mut block = [0; 4096];
                file.read_exact_at(&mut block, offset)?;
                if block.iter().any(|byte| *byte != 0) {
                    break;
                }
            }
            offsets.push(offset);
        }
        drawn.insert(path.clone(), offsets);
    }
    Ok(drawn)
}

/// All drawn blocks, as they are in the files.
pub(super) fn contents(drawn: &Drawn) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    for (path, offsets) in drawn {
        let file = File::open(path).with_context(|| format!("no {}", path.display()))?;
        read_all(&file, offsets, &mut bytes)?;
    }
    Ok(bytes)
}

fn read_all(file: &File, offsets: &[u64], bytes: &mut Vec<u8>) -> Result<()> {
    for offset in offsets {
        let mut block = [0; 4096];
        file.read_exact_at(&mut block, *offset)?;
        bytes.extend_from_slice(&block);
    }
    Ok(())
}

/// `cargo xtask read-blocks FILE OFFSET:LENGTH...`: writes the blocks to
/// standard output.
pub(crate) fn read(file: &Path, extents: &[String]) -> Result<()> {
    let offset = |extent: &String| match extent.split_once(':') {
        Some((offset, "4096")) => Ok(offset.parse()?),
        _ => bail!("{extent} is no block"),
    };
    let offsets: Vec<u64> = extents.iter().map(offset).collect::<Result<_>>()?;
    let file = File::open(file).with_context(|| format!("cannot read {}", file.display()))?;
    let mut bytes = Vec::new();
    read_all(&file, &offsets, &mut bytes)?;
    Ok(std::io::stdout().write_all(&bytes)?)
}
