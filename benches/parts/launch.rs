//! Steps of a launch that can be taken alone.

use std::{
    fs::File,
    hint::black_box,
    io,
    os::fd::{AsFd as _, BorrowedFd},
};

use criterion::{Criterion, Throughput};
use dispatcher::{
    jail::{
        cgroup::{CgroupLimits, Hierarchy},
        namespaces::{Cloned, clone},
    },
    sys,
    units::{Limit, MilliCpus},
};
use rustix::process::{Pid, WaitOptions, getpid, waitpid};

/// Memory that holds a program, and can't be changed.
pub fn memfd(criterion: &mut Criterion) {
    for (size, name) in [(1 << 10, "1KiB"), (1 << 20, "1MiB")] {
        let content = vec![7; size];
        let mut group = criterion.benchmark_group("launch/memfd");
        group.throughput(Throughput::Bytes(size as u64));
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                sys::sealed_memfd(c"bench", &[black_box(&content)], true).expect("a sealed memfd")
            });
        });
        group.finish();
    }
}

/// A launch's packet with its five descriptors, sent and received.
pub fn packet(criterion: &mut Criterion) {
    let (here, there) = sys::seqpacket_pair().expect("a pair of sockets");
    let file = File::open("/dev/null").expect("/dev/null");
    let descriptors: [BorrowedFd<'_>; 5] = std::array::from_fn(|_| file.as_fd());
    let bytes = [7; 200];
    let mut buffer = [0; 16 << 10];
    criterion.bench_function("launch/packet", |bencher| {
        bencher.iter(|| {
            sys::send_packet(&here, black_box(&bytes), &descriptors).expect("there is room");
            sys::receive_packet(&there, &mut buffer).expect("it arrived")
        });
    });
}

/// A run's cgroups with the limits of the default policy, made and removed.
pub fn cgroup(criterion: &mut Criterion) {
    const NAME: &str = "launch/cgroup";
    let instance = format!("bench-{}", std::process::id());
    let hierarchy = match Hierarchy::open("", &instance, &[getpid()]) {
        Ok(hierarchy) => hierarchy,
        Err(error) => return left_out(NAME, &error.to_string()),
    };
    let limits = CgroupLimits {
        memory: Limit::At(512 << 20),
        swap: Limit::At(0),
        cpus: Limit::At(MilliCpus(1000)),
        pids: Limit::At(256),
    };
    let once = || {
        let made = hierarchy.create("run", &limits, &[]).map_err(|error| error.to_string())?;
        made.remove().map_err(|_| "it can't be removed".to_owned())
    };
    match once() {
        Ok(()) => {
            criterion.bench_function(NAME, |bencher| bencher.iter(|| once().expect("as before")));
        }
        Err(why) => left_out(NAME, &why),
    }
    if let Err(error) = hierarchy.close() {
        eprintln!("{NAME}: {error}");
    }
}

/// A child that ends at once: in the namespaces of whoever makes it; in new ones of every kind that a
/// run has, but for a network; and with that.
pub fn namespaces(criterion: &mut Criterion) {
    let flags = libc::CLONE_NEWUSER
        | libc::CLONE_NEWNS
        | libc::CLONE_NEWPID
        | libc::CLONE_NEWIPC
        | libc::CLONE_NEWUTS
        | libc::CLONE_NEWCGROUP;
    let kinds = [("none", 0), ("without-net", flags), ("with-net", flags | libc::CLONE_NEWNET)];
    for (name, flags) in kinds {
        let name = format!("launch/clone/{name}");
        match child(flags) {
            Ok(()) => {
                criterion.bench_function(&name, |bencher| {
                    bencher.iter(|| child(flags).expect("as before"));
                });
            }
            Err(error) => left_out(&name, &error.to_string()),
        }
    }
}

fn child(flags: i32) -> io::Result<()> {
    // SAFETY: this program has one thread, as criterion is built here, and the
    // child makes one system call.
    match unsafe { clone(flags as u64, None)? } {
        Cloned::Child => sys::exit_now(0),
        Cloned::Parent(pid, _pidfd) => {
            waitpid(Pid::from_raw(pid), WaitOptions::empty())?;
            Ok(())
        }
    }
}

fn left_out(name: &str, why: &str) {
    eprintln!("{name}: left out: {why}");
}
