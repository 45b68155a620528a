//! What the kernel makes of it. These need root, or a delegated v2 subtree; a
//! skip says so, and is a failure where `CI` is set.

mod support;

use std::{
    fs,
    os::fd::AsRawFd as _,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, WaitOptions, waitpid};

use self::support::*;
use super::{layout::Layout, *};
use crate::{jail::message::Oom, testing::cgroup_turn};

#[test]
fn limits_are_in_force_before_anyone_is_in() {
    let Some(host) = Host::open("limits", &CONTROLS) else { return };
    let cgroup = host.hierarchy.create("run", &limits(), &[]).unwrap();
    let mut enforced = cgroup.enforced().to_vec();
    enforced.sort();
    assert_eq!(enforced, CONTROLS);
    let value = |legacy: &str, unified: &str| {
        host.hierarchy
            .directories("run")
            .iter()
            .find_map(|source| {
                let file = if source.kind.is_unified() { unified } else { legacy };
                fs::read_to_string(source.path.join(file)).ok()
            })
            .map(|text| text.trim().to_owned())
    };
    let memory = (32 * MIB).to_string();
    assert_eq!(value("memory.limit_in_bytes", "memory.max").as_deref(), Some(&*memory));
    assert_eq!(value("pids.max", "pids.max").as_deref(), Some("17"), "init is allowed for");
    let cpu = value("cpu.cfs_quota_us", "cpu.max").unwrap();
    assert!(["100000", "100000 100000"].contains(&&*cpu), "{cpu}");
    if let Some(swap) = value("memory.memsw.limit_in_bytes", "memory.swap.max") {
        assert!([&*memory, "0"].contains(&&*swap), "{swap}");
    }
    assert!(!occupied(&host.hierarchy));
    assert!(host.hierarchy.create("run", &limits(), &[]).is_err(), "the name is taken");
    remove(cgroup);
    let tiny = CgroupLimits { cpus: Limit::At(MilliCpus(1)), ..CgroupLimits::UNLIMITED };
    let cgroup = host.hierarchy.create("run", &tiny, &[]).unwrap();
    assert!(cgroup.enforced().contains(&Control::CgroupCpu), "the smallest share is a valid quota");
    assert!(!cgroup.enforced().contains(&Control::CgroupMemory));
    remove(cgroup);
    host.close();
}

#[test]
fn a_tenant_over_its_own_limit_is_blamed() {
    let Some(host) = Host::open("own", &[Control::CgroupMemory, Control::CgroupSwap]) else {
        return;
    };
    let mut cgroup = host.hierarchy.create("run", &limits(), &[]).unwrap();
    cgroup.start_measuring().unwrap();
    assert_eq!(cgroup.oom(), Oom::None);
    let child = Child::run(&cgroup, hog);
    assert_eq!(child.wait().terminating_signal(), Some(Signal::KILL.as_raw()));
    assert_eq!(cgroup.oom(), Oom::Own);
    let usage = cgroup.usage();
    assert!((30 * MIB..=32 * MIB).contains(&usage.memory_peak), "{usage:?}");
    remove(cgroup);
    host.close();
}

#[test]
fn a_tenant_under_its_own_limit_is_not_blamed() {
    let Some(host) = Host::open("host", &[Control::CgroupMemory, Control::CgroupSwap]) else {
        return;
    };
    let (kind, above) = host.memory_directory();
    let file = if kind.is_unified() { "memory.max" } else { "memory.limit_in_bytes" };
    let swap = if kind.is_unified() { "memory.swap.max" } else { "memory.memsw.limit_in_bytes" };
    files::write(&above, file, "16777216").unwrap();
    if above.join(swap).exists() {
        files::write(&above, swap, if kind.is_unified() { "0" } else { "16777216" }).unwrap();
    }
    let cgroup = host.hierarchy.create("run", &limits(), &[]).unwrap();
    let child = Child::run(&cgroup, hog);
    assert_eq!(child.wait().terminating_signal(), Some(Signal::KILL.as_raw()));
    assert_eq!(cgroup.oom(), Oom::Host);
    remove(cgroup);
    host.close();
}

#[test]
fn what_was_used_before_the_start_is_forgotten() {
    let Some(host) = Host::open("peak", &[Control::CgroupMemory, Control::CpuTime]) else {
        return;
    };
    let mut cgroup = host.hierarchy.create("run", &limits(), &[]).unwrap();
    let setup = Child::run(&cgroup, || {
        touch(24 << 20);
        spin_for_half_a_second();
    });
    assert_eq!(setup.wait().exit_status(), Some(0));
    let before = cgroup.usage();
    assert!(before.memory_peak >= 24 * MIB, "{before:?}");
    cgroup.start_measuring().unwrap();
    let program = Child::run(&cgroup, || touch(4 << 20));
    assert_eq!(program.wait().exit_status(), Some(0));
    let after = cgroup.usage();
    assert!(after.memory_peak >= 4 * MIB, "{after:?}");
    let forgets = !host.memory_directory().0.is_unified() || cgroup_peak_is_fresh(&cgroup);
    assert_eq!(after.memory_peak < 16 * MIB, forgets, "{after:?}");
    let half = Duration::from_millis(500);
    assert!(before.user + before.system >= half, "{before:?}");
    assert!(after.user + after.system < half, "{after:?}");
    remove(cgroup);
    host.close();
}

fn cgroup_peak_is_fresh(cgroup: &Cgroup) -> bool {
    format!("{cgroup:?}").contains("fresh_peak: Some")
}

#[test]
fn tasks_are_limited_and_counted() {
    let Some(host) = Host::open("pids", &[Control::CgroupPids]) else { return };
    let five = CgroupLimits { pids: Limit::At(5), ..CgroupLimits::UNLIMITED };
    let cgroup = host.hierarchy.create("run", &five, &[]).unwrap();
    let child = Child::run(&cgroup, fork_all);
    // Six may be in it, one of them init; here that one is the forker's fifth child.
    assert_eq!(child.wait().exit_status(), Some(5));
    assert_eq!(cgroup.usage().pids_peak, 5);
    if !cgroup.kill() {
        host.close();
        return;
    }
    until("the end of the children", || !occupied(&host.hierarchy));
    remove(cgroup);
    host.close();
}

#[test]
fn processor_time_is_limited_and_counted() {
    let Some(host) = Host::open("cpu", &[Control::CgroupCpu, Control::CpuTime]) else { return };
    let tenth = CgroupLimits { cpus: Limit::At(MilliCpus(100)), ..CgroupLimits::UNLIMITED };
    let cgroup = host.hierarchy.create("run", &tenth, &[]).unwrap();
    let began = Instant::now();
    let child = Child::run(&cgroup, spin_forever);
    until("100 ms of CPU time", || {
        cgroup.cpu_usage().unwrap().total() >= Duration::from_millis(100)
    });
    let wall = began.elapsed();
    assert!(wall > Duration::from_millis(500), "100 ms at a tenth took only {wall:?}");
    rustix::process::kill_process(child.pid, Signal::KILL).unwrap();
    child.wait();
    let usage = cgroup.usage();
    assert!(usage.user > Duration::ZERO, "it spun: {usage:?}");
    remove(cgroup);
    host.close();
}

#[test]
fn killing_takes_all_and_an_occupied_one_is_given_back() {
    let Some(host) = Host::open("kill", &[Control::CgroupKill]) else { return };
    kill_and_remove(&host.hierarchy);
    host.close();
}

/// Whether any process is in the cgroup of the name that these tests give.
fn occupied(hierarchy: &Hierarchy) -> bool {
    let sources = hierarchy.directories("run");
    sources.iter().any(|source| !files::processes(&source.path).unwrap().is_empty())
}

fn kill_and_remove(hierarchy: &Hierarchy) {
    let cgroup = hierarchy.create("run", &CgroupLimits::UNLIMITED, &[]).unwrap();
    let children = [Child::run(&cgroup, pause_forever), Child::run(&cgroup, spin_forever)];
    assert!(occupied(hierarchy));
    let cgroup = cgroup.remove().expect_err("it is occupied");
    assert!(cgroup.kill());
    for child in children {
        assert_eq!(child.wait().terminating_signal(), Some(Signal::KILL.as_raw()));
    }
    until("emptiness", || !occupied(hierarchy));
    remove(*cgroup);
}

/// A child that ends at once, in a cgroup that is then handed over to be kept.
fn use_once(kept: &mut KeptCgroups, cgroup: Cgroup, body: fn()) -> usize {
    Child::run(&cgroup, body).wait();
    assert!(kept.give_back(cgroup).is_ok(), "nobody is in it");
    kept.kept()
}

#[test]
fn one_of_v1_is_used_again_as_good_as_new() {
    let Some(host) = Host::open("kept", &CONTROLS) else { return };
    let mut kept = KeptCgroups::default();
    let create = |name| host.hierarchy.create(name, &limits(), &[]).unwrap();
    let again = use_once(&mut kept, create("run"), || touch(8 << 20)) == 1;
    assert_eq!(again, !host.memory_directory().0.is_unified(), "on v1 alone");
    if again {
        let other = CgroupLimits { pids: Limit::At(17), ..limits() };
        assert!(kept.take(&other).is_none(), "its limits are others");
        // Each processor keeps some pages charged ahead until it needs them for another
        // cgroup (`consume_stock`, mm/memcontrol.c). Nobody else may be at work here.
        let (_, above) = host.memory_directory();
        let mut taken = None;
        until("what was charged to it is given back", || {
            files::write(&above.join("run"), "memory.force_empty", "0").unwrap();
            taken = kept.take(&limits());
            taken.is_some()
        });
        let mut cgroup = taken.unwrap();
        assert_eq!(cgroup.enforced().len(), CONTROLS.len());
        cgroup.start_measuring().unwrap();
        let usage = cgroup.usage();
        assert!(usage.memory_peak < MIB && usage.pids_peak <= 1, "{usage:?}");
        assert!(usage.user + usage.system < Duration::from_millis(1), "{usage:?}");
        assert_eq!(use_once(&mut kept, cgroup, || touch(4 << 20)), 1, "and once more");
        kept.let_one_go().unwrap();
    }
    host.close();
}

#[test]
fn one_whose_counters_would_tell_of_its_last_run_is_not_used_again() {
    let Some(host) = Host::open("spent", &CONTROLS) else { return };
    let mut kept = KeptCgroups::default();
    let create = || host.hierarchy.create("run", &limits(), &[]).unwrap();
    assert_eq!(use_once(&mut kept, create(), hog), 0, "somebody was killed for want of memory");
    assert_eq!(use_once(&mut kept, create(), fork_three), 0, "there were more tasks");
    let mut tightened = create();
    let less = CgroupLimits { memory: Limit::At(16 * MIB), ..limits() };
    host.hierarchy.limit(&mut tightened, &less, &[]).unwrap();
    assert_eq!(use_once(&mut kept, tightened, || ()), 0, "its limits were changed");
    host.close();
}

/// Three children at once.
fn fork_three() {
    let mut children = [0; 3];
    for child in &mut children {
        // SAFETY: the child only waits for a signal.
        *child = unsafe { libc::fork() };
        if *child == 0 {
            pause_forever();
        }
    }
    for child in children {
        // SAFETY: plain numbers; the status is not asked for.
        unsafe {
            libc::kill(child, libc::SIGKILL);
            libc::waitpid(child, std::ptr::null_mut(), 0);
        }
    }
}

#[test]
fn a_child_can_be_cloned_into_it() {
    let Some(host) = Host::open("clone", &[Control::CgroupKill]) else { return };
    let cgroup = host.hierarchy.create("run", &CgroupLimits::UNLIMITED, &[]).unwrap();
    let directory = cgroup.v2_dir_fd().unwrap();
    // SAFETY: all zeroes is a clone_args that asks for nothing.
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    arguments.flags = 0x2_0000_0000; // CLONE_INTO_CGROUP
    arguments.exit_signal = libc::SIGCHLD as u64;
    arguments.cgroup = directory.as_raw_fd() as u64;
    // SAFETY: the arguments are valid for their size; without CLONE_VM it is a fork.
    match unsafe { libc::syscall(libc::SYS_clone3, &raw const arguments, size_of_val(&arguments)) }
    {
        0 => pause_forever(),
        pid => {
            let pid = Pid::from_raw(i32::try_from(pid).unwrap()).expect("clone3");
            assert!(occupied(&host.hierarchy));
            for other in cgroup.others().unwrap() {
                let pid = pid.as_raw_nonzero().to_string();
                rustix::io::write(&other, pid.as_bytes()).unwrap();
            }
            assert!(cgroup.kill());
            waitpid(Some(pid), WaitOptions::empty()).unwrap();
        }
    }
    remove(cgroup);
    host.close();
}

#[test]
fn what_a_dead_instance_left_is_swept() {
    let Some(host) = Host::open("dead", &[Control::CgroupPids]) else { return };
    let directories = host.directories();
    let cgroup = host.hierarchy.create("run", &limits(), &CONTROLS).unwrap();
    let child = Child::run(&cgroup, pause_forever);

    let living = Hierarchy::open("", &unique("living"), &[rustix::process::getpid()]).unwrap();
    assert!(directories.iter().all(|directory| directory.exists()), "its lock was held");
    living.close().unwrap();
    let same = Hierarchy::open("", &unique("dead"), &[rustix::process::getpid()]);
    assert!(matches!(same, Err(CgroupError::InUse(_))), "{same:?}");

    let Host { hierarchy, _turn } = host;
    drop(hierarchy); // as a crash does: the locks go, all else stays
    // Other tests' forks may hold a copy of the lock for a moment.
    until("the sweep", || {
        let next = Hierarchy::open("", &unique("next"), &[rustix::process::getpid()]).unwrap();
        assert!(next.leftovers().is_empty(), "{:?}", next.leftovers());
        next.close().unwrap();
        directories.iter().all(|directory| !directory.exists())
    });
    assert_eq!(child.wait().terminating_signal(), Some(Signal::KILL.as_raw()));
}

#[test]
fn a_leaf_that_a_dead_dispatcher_left_is_taken_over() {
    let leaf = std::cell::OnceCell::new();
    let open = || {
        let text = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let layout = Layout::parse(&text, &fs::read_to_string("/proc/self/cgroup").unwrap());
        let own = layout.unified.and_then(|mount| mount.own).unwrap_or_default();
        if own.join("cgroup.type").exists() && files::make(&own.join(supervisor::LEAF)).is_ok() {
            leaf.set(own.join(supervisor::LEAF)).unwrap();
        }
        Hierarchy::open("", &unique("leaf"), &[rustix::process::getpid()])
    };
    let Some(host) = Host::open_with(&[Control::CgroupPids], open) else { return };
    let above = host.directories()[0].parent().map(ToOwned::to_owned);
    host.close();
    let Some(leaf) = leaf.get() else { return };
    // Where strangers live beside us it was of no use.
    let taken_over = leaf.parent() == above.as_deref();
    assert_eq!(leaf.exists(), !taken_over, "{}", leaf.display());
    files::remove(leaf).unwrap();
}

#[test]
fn a_sweep_reaches_other_parents_and_leaves_strangers_alone() {
    let Some(host) = Host::open("sweep", &[Control::CgroupPids]) else { return };
    let inside = host.directories().remove(0);
    // A dead one with another parent: somewhere below, as far as we may make any.
    let parent = inside.parent().unwrap().join(format!("test-{}", std::process::id()));
    fs::create_dir(&parent).unwrap();
    let dead = parent.join("dispatcher.dead");
    files::make(&dead).unwrap();
    // As systemd makes them.
    let stranger = parent.join("dispatcher.slice");
    fs::create_dir(&stranger).unwrap();
    let claimed = instance::Instance::claim(&parent, "slice").unwrap_err();
    assert_eq!(claimed.kind(), io::ErrorKind::AlreadyExists);
    let next = Hierarchy::open("", &unique("sweeper"), &[rustix::process::getpid()]).unwrap();
    next.close().unwrap();
    let (dead_left, stranger_left) = (dead.exists(), stranger.exists());
    for directory in [&stranger, &dead, &parent] {
        files::remove(directory).unwrap();
    }
    assert!(!dead_left && stranger_left, "dead: {dead_left}, stranger: {stranger_left}");
    host.close();
}

#[test]
fn a_restarted_launcher_takes_its_instance_over() {
    let Some(host) = Host::open("again", &[Control::CgroupPids]) else { return };
    let cgroup = host.hierarchy.create("run", &limits(), &CONTROLS).unwrap();
    let child = Child::run(&cgroup, pause_forever);
    let Host { hierarchy, _turn } = host;
    drop(hierarchy);
    let again = Hierarchy::open("", &unique("again"), &[rustix::process::getpid()]).unwrap();
    assert_eq!(child.wait().terminating_signal(), Some(Signal::KILL.as_raw()));
    let cgroup = again.create("run", &limits(), &CONTROLS).unwrap();
    remove(cgroup);
    Host { hierarchy: again, _turn }.close();
}

#[test]
fn a_configured_parent_is_made_and_removed() {
    let mut parent = String::new();
    let open =
        |parent: &str| Hierarchy::open(parent, &unique("parent"), &[rustix::process::getpid()]);
    let Some(host) = Host::open_with(&CONTROLS, || {
        // Ordinary users may only make cgroups below their own.
        let root = rustix::process::geteuid().is_root();
        let above = if root { String::new() } else { own_path() };
        parent = format!("{above}/dispatcher-test-{}/inner", std::process::id());
        open(&parent)
    }) else {
        return;
    };
    let tops: Vec<_> = host
        .directories()
        .iter()
        .map(|directory| directory.parent().unwrap().parent().unwrap().to_owned())
        .collect();
    let made = parent.strip_prefix('/').unwrap().strip_suffix("/inner").unwrap();
    assert!(tops.iter().all(|top| top.ends_with(made)), "{tops:?}");
    remove(host.hierarchy.create("run", &limits(), &[]).unwrap());
    // A crash forgets what was made above; the mark on it does not.
    let Host { hierarchy, _turn } = host;
    drop(hierarchy);
    let hierarchy = open(&parent).unwrap();
    Host { hierarchy, _turn }.close();
    for top in tops {
        assert!(!top.exists(), "{} is left", top.display());
    }
}

/// Our own v2 cgroup.
fn own_path() -> String {
    let text = fs::read_to_string("/proc/self/cgroup").unwrap();
    Layout::parse("", &text).unified_path
}

#[test]
fn pure_v1_gets_a_v2_hierarchy_of_its_own() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("not for ordinary users: only root can mount it");
        return;
    }
    let read = |path| fs::read_to_string(path).unwrap();
    let mut layout = Layout::parse(&read("/proc/self/mountinfo"), &read("/proc/self/cgroup"));
    layout.unified = None;
    let open = || Hierarchy::open_in(&layout, "", &unique("v1"), &[rustix::process::getpid()]);
    let Some(host) = Host::open_with(&[Control::CgroupKill], open) else { return };
    assert!(host.directories()[0].starts_with("/proc/self/fd"), "{:?}", host.directories());
    kill_and_remove(&host.hierarchy);
    host.close();
}

#[test]
fn a_host_without_cgroups_lacks_all_and_says_why() {
    let none = Layout { unified: None, ..Layout::default() };
    let turn = cgroup_turn();
    let hierarchy = Hierarchy::open_in(&none, "", &unique("none"), &[]).unwrap();
    for control in [Control::CgroupMemory, Control::CgroupPids, Control::CgroupCpu] {
        // Root may have mounted v2 for itself, with all that a v2-only host offers.
        let Some(lack) = hierarchy.available().lacking(control) else { continue };
        assert!(!lack.why.is_empty() && !lack.mend.is_empty(), "{lack:?}");
        let refused = hierarchy.create("run", &limits(), &[]);
        assert!(matches!(refused, Err(CgroupError::Lacking { .. })), "{refused:?}");
    }
    let cgroup = hierarchy.create("run", &CgroupLimits::UNLIMITED, &CONTROLS).unwrap();
    remove(cgroup);
    hierarchy.close().unwrap();
    drop(turn);
}
