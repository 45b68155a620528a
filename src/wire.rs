//! The generated types of `proto/`, and their descriptors for reflection.

#![allow(missing_docs, clippy::all, clippy::pedantic)]

use std::sync::LazyLock;

use prost_reflect::DescriptorPool;

tonic::include_proto!("collector");

/// The compiled descriptors of all three files and what they import.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

/// The message types that are known: the well-known ones and the wire's own.
pub static POOL: LazyLock<DescriptorPool> = LazyLock::new(|| {
    let mut pool = DescriptorPool::global();
    // The descriptors are our own build's; without them only fewer types are known.
    if let Err(error) = pool.decode_file_descriptor_set(DESCRIPTORS) {
        tracing::error!(%error, "the wire's own descriptors can't be used");
    }
    pool
});
