//! Container mode: `dispatch-docker`, the one process that has Docker's socket.
//!
//! | file | what |
//! | --- | --- |
//! | `process`, `message` | the process, and what the monitor says to it |
//! | `office`, `server` | what all runs share; the conversation with the server |
//! | `run`, `flow`, `seat` | one run, from its launch to its end; its input and output; where it is found meanwhile |
//! | `service` | the sockets of a container that is a gRPC service |
//! | `ahead` | containers that wait for the next calls |
//! | `make`, `queue` | a container in which init waits; whose turn it is to have one |
//! | `inventory` | which containers are ours, and their certain removal |
//! | `spec`, `image` | a policy in Docker's words; a root as an image |
//! | `slot` | what a container sees of ours |
//! | `verify`, `demand` | what is in force in it, by the kernel's word; whether that will do |
//! | `engine` | Docker's API |
//! | `owner` | whose a container is |
//! | `init.rs`, `protocol`, `marks` | PID 1 of each container, a program of its own, and what it says |
//!
//! A container is like a jail: its init waits until the call is there, says how the program
//! ended by the kernel's word, and is the last in it while usage is read.

pub mod ahead;
pub mod demand;
pub mod engine;
#[cfg(test)]
mod fake;
pub mod flow;
pub mod image;
pub mod inventory;
pub mod make;
#[cfg(test)]
mod make_tests;
pub mod marks;
pub mod message;
pub mod office;
pub mod owner;
pub mod process;
pub mod protocol;
pub mod queue;
pub mod run;
pub mod seat;
pub mod server;
pub mod service;
pub mod slot;
pub mod spec;
pub mod verify;

// No part of this crate; named here so that `cargo fmt` finds it.
#[cfg(any())]
mod init;

/// The executable that is bound into each container at [`protocol::INIT_PATH`].
pub const INIT: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/container-init"));
