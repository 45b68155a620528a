//! From files to rules, and from rules to a filter.

use std::{hint::black_box, path::Path};

use criterion::Criterion;
use dispatcher::{
    jail::{
        plan::Network,
        seccomp::{
            filter::{FilterOptions, compile},
            profile::default_profile,
        },
    },
    names::Namespace,
    policy::compile::{host_user, load},
};

/// The policies that come with the project: read and compiled, and one chosen for a call.
pub fn resolution(criterion: &mut Criterion) {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("policies");
    criterion.bench_function("policy/load", |bencher| {
        bencher.iter(|| load(black_box(&directory), &host_user).expect("policies/ is in order"));
    });
    let set = load(&directory, &host_user).expect("policies/ is in order").set;
    for name in ["batch", "elsewhere"] {
        let namespace: Namespace = name.parse().expect("a namespace");
        criterion.bench_function(&format!("policy/choose/{name}"), |bencher| {
            bencher.iter(|| set.choose(black_box(&namespace), "greeter", "greet").is_some());
        });
    }
}

/// The built-in profile to a BPF program.
pub fn filter(criterion: &mut Criterion) {
    let profile = default_profile();
    let options = FilterOptions {
        network: Network::None,
        refuse_exec_memfd: false,
        refuse_set_id: false,
        spare_init: false,
        exec_fd: 256,
        control_fd: 257,
        notify: true,
    };
    criterion.bench_function("filter/compile", |bencher| {
        bencher.iter(|| compile(black_box(&profile), &options).expect("the default compiles"));
    });
}
