//! A file per command.

pub mod config;
pub mod policy;
