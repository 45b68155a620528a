//! Examining the host that the tests run on, whichever it is.

use std::{path::PathBuf, sync::MutexGuard};

use super::*;
use crate::{
    jail::{
        limits,
        plan::{Bind, Filesystem, Limits, Mode, Network, Root},
    },
    testing::cgroup_turn,
    units::Limit,
};

/// Keep the second for as long as the first.
fn examine() -> (Host, MutexGuard<'static, ()>) {
    let turn = cgroup_turn();
    let settings = Settings { cgroup_parent: String::new(), uid_range: (2_000_000, 2_065_535) };
    (Host::examine(&settings).unwrap(), turn)
}

fn filesystem(binds: Vec<Bind>) -> Filesystem {
    Filesystem { root: Root::Empty, tmp: Some(Limit::At(1 << 20)), tmp_exec: false, binds }
}

fn demand<'a>(limits: &'a Limits, filesystem: &'a Filesystem) -> Demand<'a> {
    Demand {
        listens: false,
        mode: Mode::Jail,
        best_effort: &[],
        limits,
        filesystem,
        network: Network::None,
        keeps_capabilities: false,
        user: "nobody",
    }
}

#[test]
fn every_control_is_told_once_in_the_order_of_reports() {
    let (host, _turn) = examine();
    let controls: Vec<_> = host
        .findings()
        .iter()
        .filter_map(|finding| match finding.subject {
            Subject::Control(control) => Some(control.word()),
            Subject::Feature(_) => None,
        })
        .collect();
    assert_eq!(controls, Control::ALL.map(Control::word));
    for finding in host.findings().iter().filter(|finding| !finding.ok) {
        assert!(!finding.why.is_empty() && !finding.mend.is_empty(), "{finding:?}");
    }
    host.close().unwrap();
}

#[test]
fn what_is_tried_agrees_with_what_the_kernel_says() {
    let (host, _turn) = examine();
    let ok = |subject| host.finding(subject).unwrap().ok;
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    assert_eq!(
        ok(Subject::Feature(Feature::MemfdExec)),
        read("/proc/sys/vm/memfd_noexec").trim() != "2",
        "{:?}",
        host.finding(Subject::Feature(Feature::MemfdExec))
    );
    assert_eq!(ok(Subject::Control(Control::HostUid)), host.is_root());
    let lsms = read("/sys/kernel/security/lsm");
    if !lsms.is_empty() {
        assert_eq!(ok(Subject::Control(Control::Landlock(0))), lsms.contains("landlock"));
    }
    host.close().unwrap();
}

#[test]
fn a_policy_lacks_what_the_host_lacks() {
    let (host, _turn) = examine();
    let (limits, filesystem) = (Limits::default(), filesystem(Vec::new()));
    let demand = demand(&limits, &filesystem);
    let mut lacking: Vec<_> =
        host.shortfalls(&demand).iter().map(|one| one.subject.to_string()).collect();
    let optional = |finding: &&Finding| {
        let needless = match finding.subject {
            // Ordinary users go without the first; the policy has no use for the others.
            Subject::Control(Control::HostUid) => !host.is_root(),
            Subject::Feature(Feature::IdmappedMounts | Feature::SeccompNotify) => true,
            _ => false,
        };
        !finding.ok && !needless
    };
    let mut expected: Vec<_> =
        host.findings().iter().filter(optional).map(|f| f.subject.to_string()).collect();
    lacking.sort();
    expected.sort();
    assert_eq!(lacking, expected);

    let best_effort = Demand { best_effort: &Control::ALL, ..demand };
    assert!(
        host.shortfalls(&best_effort).iter().all(|one| matches!(one.subject, Subject::Feature(_))),
        "{:?}",
        host.shortfalls(&best_effort)
    );
    let container = Demand { mode: Mode::Container, ..demand };
    assert!(host.shortfalls(&container).is_empty());
    host.close().unwrap();
}

#[test]
fn direct_mode_can_be_had_as_a_user_that_can_be_become() {
    let (host, _turn) = examine();
    let (limits, filesystem) = (Limits::default(), filesystem(Vec::new()));
    let direct = Demand { mode: Mode::Direct, ..demand(&limits, &filesystem) };
    let wanting = |demand| {
        let found = host.shortfalls(&demand);
        found.into_iter().find(|one| one.subject == Subject::Control(Control::HostUid))
    };
    assert_eq!(wanting(direct).is_some(), !host.is_root(), "nobody");
    let accepted = Demand { best_effort: &[Control::HostUid], ..direct };
    assert_eq!(wanting(accepted), None);
    let own = nix::unistd::User::from_uid(nix::unistd::geteuid()).unwrap();
    if let Some(own) = own.filter(|own| !own.uid.is_root()) {
        assert_eq!(wanting(Demand { user: &own.name, ..direct }), None);
    }
    host.close().unwrap();
}

#[test]
fn what_a_policy_alone_asks_for_is_tried_too() {
    let (host, _turn) = examine();
    let limits = Limits { open_files: Limit::At(u64::MAX - 100), ..Limits::default() };
    let missing = Bind {
        source: PathBuf::from("/nonexistent/source"),
        target: PathBuf::from("/source"),
        read_only: true,
    };
    let filesystem = filesystem(vec![missing]);
    let found = host.shortfalls(&demand(&limits, &filesystem));
    let about = |control| found.iter().find(|one| one.subject == Subject::Control(control));
    let enough = u64::MAX - 100 + limits::PARKED;
    assert_eq!(limits::open_files(&limits, enough), Ok(u64::MAX - 100));
    assert_eq!(limits::open_files(&limits, enough - 1), Err(u64::MAX - 101));
    let mend = &about(Control::Rlimits).unwrap().mend;
    assert!(mend.contains(&format!("LimitNOFILE={enough} ")), "{mend}");
    let root = about(Control::RootReadonly).unwrap();
    let told = host.finding(Subject::Control(Control::RootReadonly)).unwrap();
    assert!(!told.ok || root.why.contains("/nonexistent/source"), "{root:?}");
    host.close().unwrap();
}
