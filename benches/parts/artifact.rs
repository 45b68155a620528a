//! What is done about a program before it runs.

use std::{fs, hint::black_box};

use criterion::{Criterion, Throughput};
use dispatcher::{artifact::elf, names::Digest};

const SIZE: usize = 1 << 20;

/// The digest of a program.
pub fn digest(criterion: &mut Criterion) {
    let bytes = vec![7; SIZE];
    let mut group = criterion.benchmark_group("artifact");
    group.throughput(Throughput::Bytes(SIZE as u64));
    group.bench_function("digest/1MiB", |bencher| bencher.iter(|| Digest::of(black_box(&bytes))));
    group.finish();
}

/// Whether some bytes are a program, and what it needs: of this very one.
pub fn inspection(criterion: &mut Criterion) {
    let itself = std::env::current_exe().and_then(fs::read).expect("a program can read itself");
    criterion.bench_function("artifact/inspect", |bencher| {
        bencher.iter(|| elf::inspect(black_box(&itself)).expect("a program"));
    });
}
