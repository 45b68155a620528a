//! The parts of a call, each alone: `cargo bench --bench parts [NAME]`.
//!
//! What can't be done on this host, or by this user, is left out by name.

mod artifact;
mod codec;
mod launch;
mod policy;

use criterion::{criterion_group, criterion_main};

criterion_group!(
    parts,
    policy::resolution,
    policy::filter,
    codec::launcher,
    codec::wire,
    artifact::digest,
    artifact::inspection,
    launch::memfd,
    launch::packet,
    launch::cgroup,
    launch::namespaces,
);
criterion_main!(parts);
