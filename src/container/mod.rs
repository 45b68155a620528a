//! Container mode: what a run in a container of Docker's is made of.
//!
//! So far, only its PID 1: `init.rs` is a program of its own, which build.rs compiles and
//! the dispatcher carries with it ([`INIT`]); `protocol` is what the two say to each other.

pub mod protocol;

// No part of this crate; named here so that `cargo fmt` finds it.
#[cfg(any())]
mod init;

/// The executable that is bound into each container at [`protocol::INIT_PATH`].
pub const INIT: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/container-init"));
