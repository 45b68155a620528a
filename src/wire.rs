//! The generated types of `proto/`, and their descriptors for reflection.

#![allow(missing_docs, clippy::all, clippy::pedantic)]

tonic::include_proto!("collector");

/// The compiled descriptors of all three files and what they import.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
