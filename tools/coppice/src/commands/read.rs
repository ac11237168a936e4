//! `coppice read`: some bytes of an image, without the rest.

use std::fs::File;
use std::io::IsTerminal;
use std::os::fd::AsFd;

use anyhow::{Context, Result, bail};

use crate::cli::Read;
use crate::client::{Client, unexpected, with_file};
use crate::rpc::{Part, Reply, Request};

pub(super) fn read(client: &Client, options: Read) -> Result<()> {
    let part = match (options.memory, options.disk) {
        (true, _) => Part::Memory,
        (false, Some(index)) => Part::Disk(index),
        (false, None) => Part::Main,
    };
    let out = std::io::stdout();
    if out.is_terminal() {
        bail!("standard output is a terminal: send the bytes to a file or another program");
    }
    let out = File::from(out.as_fd().try_clone_to_owned().context("no standard output")?);
    let request = Request::Read { name: options.name, part, extents: options.extents };
    match client.ask(request, &with_file(&out), &mut |_| {})?.0 {
        Reply::Exported { .. } => Ok(()),
        other => unexpected(&other),
    }
}
