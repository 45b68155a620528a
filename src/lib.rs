//! `dispatcher`: a hardened service that runs the binary you send it.
//!
//! The binary (`src/main.rs`) is a thin shell around this library.
//! ARCHITECTURE.md is the map.

pub mod admission;
pub mod artifact;
pub mod audit;
pub mod call;
pub mod cli;
pub mod config;
pub mod container;
pub mod dispatch;
pub mod execute;
pub mod host;
pub mod instances;
pub mod jail;
pub mod monitor;
pub mod names;
pub mod observe;
pub mod packets;
pub mod policy;
pub mod protocol;
pub mod server;
pub mod sys;
#[cfg(test)]
mod testing;
pub mod units;
pub mod wire;
