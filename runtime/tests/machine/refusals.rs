//! What is refused, and how it is said.

use std::os::fd::AsFd;

use coppice_runtime::pieces::Piece;
use coppice_runtime::protocol::{MachineConfig, Start, VmmReply, VmmRequest};

use crate::guest::has_kvm;
use crate::harness::{Process, config, memfd};

fn boot(config: &MachineConfig, kernel: &[u8]) -> Result<VmmReply, String> {
    let start = Start::Boot { cmdline: "quiet".to_owned() };
    build(config, start, &memfd(kernel))
}

fn build(config: &MachineConfig, start: Start, image: &std::fs::File) -> Result<VmmReply, String> {
    let disk = memfd(&[0; 8192]);
    let (log, overlay) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
    let request = VmmRequest::Build { config: config.clone(), nets: Vec::new(), start };
    let descriptors = [log.as_fd(), disk.as_fd(), overlay.as_fd(), image.as_fd()];
    Process::start().ask(&request, &descriptors).map(|(reply, _)| reply)
}

fn small() -> MachineConfig {
    config(64, &memfd(&[0; 8192]))
}

#[test]
fn a_file_that_is_no_kernel() {
    if !has_kvm() {
        return;
    }
    let error = boot(&small(), b"#!/bin/sh\nexit 1\n").unwrap_err();
    assert!(error.contains("no x86-64 Linux kernel"), "{error}");
}

#[test]
fn configurations_that_no_machine_has() {
    if !has_kvm() {
        return;
    }
    let odd_memory = MachineConfig { memory_bytes: 12345, ..small() };
    assert!(boot(&odd_memory, b"").unwrap_err().contains("memory of 12345 bytes"));
    let no_cpu = MachineConfig { vcpus: 0, ..small() };
    assert!(boot(&no_cpu, b"").unwrap_err().contains("0 vCPUs"));
    let mut odd_disk = small();
    odd_disk.disks[0].len = 100;
    assert!(boot(&odd_disk, b"").unwrap_err().contains("a disk of 100 bytes"));
    let mut long_disk = small();
    long_disk.disks[0].len = 1 << 20;
    assert!(boot(&long_disk, b"").unwrap_err().contains("8192 bytes where 1048576"));
}

#[test]
fn a_state_that_is_none() {
    if !has_kvm() {
        return;
    }
    for (state, said) in [
        (&b"nonsense"[..], "do not start with its magic"),
        (b"COPPVMST\x63\0\0\0", "version 99"),
        (b"COPPVMST\x01\0\0\0\x00", "malformed or cut off"),
    ] {
        let start = Start::Restore {
            state: state.to_vec(),
            memory: Piece::whole(small().memory_bytes / 4096, 0),
            frozen: vec![Vec::new()],
        };
        let error = build(&small(), start, &memfd(&[0; 4096])).unwrap_err();
        assert!(error.contains(said), "{error}");
    }
}

#[test]
fn requests_in_the_wrong_order_leave_the_process_alive() {
    let mut process = Process::start();
    for request in [VmmRequest::Resume, VmmRequest::Save, VmmRequest::Connect { port: 1 }] {
        assert!(process.ask(&request, &[]).is_err());
    }
    let (reply, _) = process.ask(&VmmRequest::Stop, &[]).unwrap();
    assert_eq!(reply, VmmReply::Stopping);
    assert!(process.wait().success());
}

#[test]
fn a_machine_ends_with_its_supervisor() {
    assert!(Process::start().abandon().success());
}
