//! What a program finds around it: files, networks, system calls.

use std::fs;

use dispatcher::wire::ExecutionMode;

use super::{Mode, dispatcher, programs};

/// What is to be seen in an empty root without being the policy's.
pub struct Root {
    /// Names in /.
    pub top: &'static [&'static str],
    /// Names in /etc.
    pub etc: &'static [&'static str],
    /// Names in /dev besides the five harmless ones.
    pub dev: &'static [&'static str],
}

const DEVICES: [&str; 5] = ["full", "null", "random", "urandom", "zero"];

pub fn an_empty_root_shows_nothing_of_the_hosts(at: &Mode) {
    // Direct mode's program is among the host's files.
    let Some(root) = &at.root else { return };
    let listing = ["ls", "/", "ls", "/etc", "ls", "/dev", "ls", "/sys", "ls", "/dev/pts"];
    let listing = dispatcher().run(at.name, "act", &listing).ok().facts();
    let names = |directory| {
        let mut names = listing.set(directory);
        names.remove("ENOENT");
        names
    };
    let known = |known: &[&'static str]| known.iter().copied().collect();
    assert!(names("/").is_superset(&known(&["dev", "proc", "tmp"])), "{:?}", names("/"));
    assert!(names("/").is_subset(&known(root.top)), "{:?}", names("/"));
    assert!(names("/etc").is_subset(&known(root.etc)), "{:?}", names("/etc"));
    let devices = &names("/dev") - &known(&DEVICES);
    assert_eq!(names("/dev").len() - devices.len(), DEVICES.len(), "{:?}", names("/dev"));
    assert!(devices.is_subset(&known(root.dev)), "{devices:?}");
    for empty in ["/sys", "/dev/pts"] {
        assert_eq!(names(empty), known(&[]), "{empty}");
    }

    let cat = |namespace: &str, file: &str| {
        dispatcher().run(namespace, "act", &["cat", file]).ok().text()
    };
    let made_up =
        [("/etc/hosts", "127.0.0.1 localhost\n::1 localhost\n"), ("/etc/resolv.conf", "")];
    let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    // Whichever network it has.
    for namespace in [at.name, &format!("{}-hostnet", at.name)] {
        for (file, made_up) in made_up {
            let expected = match at.number {
                ExecutionMode::Container => made_up.to_owned(),
                _ => format!("{file}=ENOENT\n"),
            };
            assert_eq!(cat(namespace, file), expected, "{file} in {namespace}");
        }
        let name = cat(namespace, "/etc/hostname");
        assert!(!name.contains(host.trim()), "{namespace}: {name}");
        let facts = dispatcher().run(namespace, "facts", &["process"]).ok().facts();
        assert_ne!(facts.one("hostname"), host.trim(), "{namespace}");
    }

    // Nothing that tells of the whole machine: not there, or nothing in it.
    for file in ["/proc/kcore", "/proc/keys", "/proc/timer_list", "/proc/sched_debug"] {
        let text = cat(at.name, file);
        assert!(text.is_empty() || text == format!("{file}=ENOENT\n"), "{file}: {text}");
    }
    let trigger = dispatcher().run(at.name, "act", &["write", "/proc/sysrq-trigger", ""]).ok();
    assert_ne!(trigger.facts().one("/proc/sysrq-trigger"), "ok");
}

pub fn the_network_is_the_policys(at: &Mode) {
    let inside = |kind: &str| {
        let namespace = format!("{}-{kind}", at.name);
        let reply = dispatcher().run(&namespace, "facts", &["network", "namespaces"]).ok();
        let named = reply.report.enforced.contains(&"ns.net".to_owned());
        (reply.facts(), named)
    };
    let own = fs::read_link("/proc/self/ns/net").unwrap();
    let (facts, named) = inside("hostnet");
    assert_eq!(facts.one("ns.net"), own.to_str().unwrap());
    assert!(!named, "the report says ns.net");
    assert_eq!(facts.one("socket.2.1"), "ok");
    let outside = programs::outside("facts", &["network"]).facts();
    assert_eq!(facts.set("interface"), outside.set("interface"));
    // Direct mode knows no other.
    if at.number == ExecutionMode::Direct {
        return;
    }
    let (facts, named) = inside("loopback");
    assert_ne!(facts.one("ns.net"), own.to_str().unwrap());
    assert!(named, "the report doesn't say ns.net");
    assert_eq!(facts.set("interface"), ["lo"].into());
    assert_eq!((facts.one("lo"), facts.one("socket.2.1")), ("up", "ok"));
    let facts = dispatcher().run(at.name, "facts", &["network"]).ok().facts();
    assert!(facts.set("interface").is_subset(&["lo"].into()));
    // There is no socket to ask it by, nor to use it.
    assert_eq!((facts.one("lo"), facts.maybe("socket.2.1")), ("EAFNOSUPPORT", None));
}

pub fn the_system_calls_are_the_policys(at: &Mode) {
    // Which direct mode doesn't filter.
    if at.number == ExecutionMode::Direct {
        return;
    }
    // UFFD_USER_MODE_ONLY, which takes no privilege.
    let calls = [(libc::SYS_userfaultfd, "1"), (libc::SYS_getppid, "0")];
    let outcome = |namespace: &str, (number, argument): (i64, &str)| {
        let args = ["native", &number.to_string(), argument];
        dispatcher().run(namespace, "syscall", &args).ok().facts().one("call").to_owned()
    };
    let [allowed, denied] = calls;
    assert_eq!(outcome(at.name, allowed), "EPERM");
    assert_eq!(outcome(at.name, denied), "ok");
    let outside =
        programs::outside("syscall", &["native", &libc::SYS_userfaultfd.to_string(), "1"]);
    let other = format!("{}-calls", at.name);
    assert_eq!(outcome(&other, allowed), outside.facts().one("call"));
    assert_eq!(outcome(&other, denied), "EPERM");
}
