//! Wrong input for every key there is, with the exact place and message.

use std::collections::BTreeSet;

use super::faults_of;
use crate::policy::written::describe;

/// Key, file, and how the one fault begins.
const CASES: &[(&str, &str, &str)] = &[
    ("extends", "extends = \"a/b\"", "1:11: extends has '/' at byte 1; "),
    ("extends", "extends = 1", "1:11: extends is 1, which is not the name of a policy; "),
    (
        "mode",
        "mode = \"jial\"",
        "1:8: mode is \"jial\", which is not one of the words it can be; did you mean \"jail\"?",
    ),
    ("mode", "mode = true", "1:8: mode is true, which"),
    (
        "best_effort",
        "best_effort = [\"landlock\", \"ns.usr\"]",
        "1:28: best_effort has \"ns.usr\", which is not a control; did you mean \"ns.user\"?",
    ),
    (
        "best_effort",
        "best_effort = [\"landlock.v3\"]",
        "1:16: best_effort has \"landlock.v3\", which is not a control; did you mean \"landlock\"?",
    ),
    (
        "best_effort",
        "best_effort = \"landlock\"",
        "1:15: best_effort is \"landlock\", which is not a list; write it in brackets",
    ),
    (
        "best_effort",
        "best_effort = [\"...\", \"...\"]",
        "1:23: best_effort has \"...\" twice; leave one of them out",
    ),
    (
        "allow_modes",
        "allow_modes = [\"jail\", \"docker\"]",
        "1:24: allow_modes is \"docker\", which is not one of",
    ),
    (
        "protocol",
        "protocol = \"http\"",
        "1:12: protocol is \"http\", which is not one of the words it can be; write one of \"exec\", \"grpc\"",
    ),
    ("argv", "argv = [\"plain\"]", "1:8: argv is an array, which"),
    ("output", "output = \"text\"", "1:10: output is \"text\", which"),
    (
        "limits.timeout",
        "[limits]\ntimeout = \"30\"",
        "2:11: limits.timeout is \"30\", which is not a duration; write a number with a unit",
    ),
    (
        "limits.timeout",
        "[limits]\ntimeout = 30",
        "2:11: limits.timeout is 30, which is not a duration; ",
    ),
    (
        "limits.timeout",
        "[limits]\ntimeout = \"0s\"",
        "2:11: limits.timeout is 0s, less than the least possible; write at least \"1ms\"",
    ),
    ("limits.timeout", "[limits]\ntimeout = \"none\"", "2:11: limits.timeout is \"none\", which"),
    (
        "limits.cpu_time",
        "[limits]\ncpu_time = \"-1s\"",
        "2:12: limits.cpu_time is \"-1s\", which is not a duration; ",
    ),
    (
        "limits.cpus",
        "[limits]\ncpus = 0",
        "2:8: limits.cpus is 0, which is not a number of processors from 0.001 to 1024; ",
    ),
    ("limits.cpus", "[limits]\ncpus = nan", "2:8: limits.cpus is nan, which"),
    ("limits.cpus", "[limits]\ncpus = -inf", "2:8: limits.cpus is -inf, which"),
    ("limits.cpus", "[limits]\ncpus = 1025", "2:8: limits.cpus is 1025, which"),
    (
        "limits.cpus",
        "[limits]\ncpus = \"2\"",
        "2:8: limits.cpus is \"2\", which is not a number of processors from 0.001 to 1024; write such a number, without quotes",
    ),
    (
        "limits.memory",
        "limits = { memory = \"512 potatoes\" }",
        "1:21: limits.memory is \"512 potatoes\", which is not a size; write a number of bytes or one with a unit",
    ),
    (
        "limits.memory",
        "[limits]\nmemory = \"4095KiB\"",
        "2:10: limits.memory is 4095KiB, less than the least possible; write at least \"4MiB\"",
    ),
    ("limits.memory", "[limits]\nmemory = 4194303", "2:10: limits.memory is 4194303, less"),
    ("limits.memory", "[limits]\nmemory = -1", "2:10: limits.memory is -1, which is not a size; "),
    (
        "limits.memory",
        "[limits]\nmemory = 0.5",
        "2:10: limits.memory is 0.5, which is not a size; ",
    ),
    (
        "limits.memory",
        "[limits]\nmemory = \"8388608TiB\"",
        "2:10: limits.memory is more than any memory; write \"unlimited\"",
    ),
    (
        "limits.memory",
        "[limits.memory]\nmax = 3",
        "1:1: limits.memory is a table, which is not a size; ",
    ),
    ("limits.swap", "[limits]\nswap = false", "2:8: limits.swap is false, which is not a size; "),
    (
        "limits.pids",
        "[limits]\npids = 0",
        "2:8: limits.pids is 0, which is not a whole number from 1 to 4194303; ",
    ),
    ("limits.pids", "[limits]\npids = 4194304", "2:8: limits.pids is 4194304, which"),
    ("limits.pids", "[limits]\npids = \"256\"", "2:8: limits.pids is \"256\", which"),
    ("limits.open_files", "[limits]\nopen_files = 2", "2:14: limits.open_files is 2, which"),
    (
        "limits.file_size",
        "[limits]\nfile_size = \"64 MB!\"",
        "2:13: limits.file_size is \"64 MB!\", which",
    ),
    (
        "limits.output",
        "[limits]\noutput = \"status\"",
        "2:10: limits.output is \"status\", which is not a size; ",
    ),
    ("limits.stderr", "[limits]\nstderr = []", "2:10: limits.stderr is an array, which"),
    (
        "limits.artifact_size",
        "[limits]\nartifact_size = 0",
        "2:17: limits.artifact_size is 0, less",
    ),
    ("limits.input", "[limits]\ninput = \"\"", "2:9: limits.input is \"\", which"),
    (
        "filesystem.root",
        "[filesystem]\nroot = \"emtpy\"",
        "2:8: filesystem.root is \"emtpy\", which is not a root; write \"empty\", \"host\" or",
    ),
    (
        "filesystem.root",
        "[filesystem]\nroot = \"/srv/../etc\"",
        "2:8: filesystem.root is \"/srv/../etc\", which has \"..\" in it; ",
    ),
    (
        "filesystem.root",
        "[filesystem]\nroot = \"/\"",
        "2:8: filesystem.root is \"/\", which would show the program all of it; ",
    ),
    (
        "filesystem.root",
        "[filesystem]\nroot = \"/proc/1/root\"",
        "2:8: filesystem.root is \"/proc/1/root\", which would",
    ),
    (
        "filesystem.root",
        "[filesystem]\nroot = \"/a\\u0000b\"",
        "2:8: filesystem.root contains a NUL character; leave it out",
    ),
    (
        "filesystem.tmp",
        "[filesystem]\ntmp = \"no\"",
        "2:7: filesystem.tmp is \"no\", which is not a size; ",
    ),
    (
        "filesystem.tmp",
        "[filesystem]\ntmp = 0",
        "2:7: filesystem.tmp is 0, less than the least possible; write at least \"4KiB\"",
    ),
    (
        "filesystem.tmp_exec",
        "[filesystem]\ntmp_exec = \"false\"",
        "2:12: filesystem.tmp_exec is \"false\", which is not true or false; ",
    ),
    (
        "filesystem.bind",
        "[filesystem]\nbind = [\"/srv\"]",
        "2:9: filesystem.bind is \"/srv\", which is not a table; write { source =",
    ),
    (
        "filesystem.bind",
        "[filesystem]\nbind = [{ source = \"/a\" }]",
        "2:9: filesystem.bind has an entry without target; ",
    ),
    (
        "filesystem.bind",
        "[filesystem]\nbind = [{ source = \"a\", target = \"/b\" }]",
        "2:20: filesystem.bind.source is \"a\", which is not an absolute path; ",
    ),
    (
        "filesystem.bind",
        "[filesystem]\nbind = [{ source = \"/a\", target = \"/b/../c\" }]",
        "2:35: filesystem.bind.target is \"/b/../c\", which has \"..\" in it; ",
    ),
    (
        "filesystem.bind",
        "[filesystem]\nbind = [{ source = \"/proc/1\", target = \"/b\" }]",
        "2:20: filesystem.bind.source is \"/proc/1\", which would show the host's own; ",
    ),
    (
        "filesystem.bind",
        "[filesystem]\nbind = [{ source = \"/a\", target = \"/proc//x\" }]",
        "2:35: filesystem.bind.target is \"/proc/x\", which the jail needs for itself; ",
    ),
    (
        "filesystem.bind",
        "[filesystem]\nbind = [{ source = \"/a\", target = \"/\" }]",
        "2:35: filesystem.bind.target is \"/\", which the jail",
    ),
    (
        "filesystem.bind",
        "[filesystem]\nbind = [{ source = \"/a\", target = \"/dev\" }]",
        "2:35: filesystem.bind.target is \"/dev\", which the jail",
    ),
    (
        "filesystem.bind",
        "[filesystem]\nbind = [{ source = \"/a\", target = \"/run\" }]",
        "2:35: filesystem.bind.target is \"/run\", which the jail",
    ),
    (
        "filesystem.bind",
        "[filesystem]\nbind = [{ source = \"/a\", target = \"/run/dispatcher/x\" }]",
        "2:35: filesystem.bind.target is \"/run/dispatcher/x\", which the jail",
    ),
    (
        "filesystem.bind",
        "[filesystem]\nbind = [{ source = \"/a\", target = \"/b\", read_only = 1 }]",
        "2:53: filesystem.bind.read_only is 1, which is not true or false; ",
    ),
    (
        "filesystem.bind",
        "[filesystem]\nbind = [{ source = \"/a\", target = \"/b\", readonly = true }]",
        "2:41: unknown key \"readonly\" in [filesystem.bind]; did you mean \"read_only\"?",
    ),
    (
        "filesystem.bind",
        "[filesystem]\nbind = [{ source = \"/a\", target = \"/b\" }, { source = \"/c\", target = \"/b/\" }]",
        "2:43: filesystem.bind has the target \"/b\" twice; ",
    ),
    (
        "filesystem.bind",
        "[filesystem]\nbind = [{ source = \"/a\", target = \"/tmp\" }]",
        "2:9: filesystem.bind has the target \"/tmp\", which is the private one; ",
    ),
    (
        "network.mode",
        "[network]\nmode = \"bridge\"",
        "2:8: network.mode is \"bridge\", which is not one of the words it can be; write one of \"none\", \"loopback\", \"host\"",
    ),
    (
        "seccomp.profile",
        "[seccomp]\nprofile = \"../x\"",
        "2:11: seccomp.profile is \"../x\", which has '.' at byte 0",
    ),
    (
        "seccomp.profile",
        "[seccomp]\nprofile = \"web\"",
        "2:11: seccomp.profile is \"web\", and there is no seccomp/web.json; ",
    ),
    (
        "seccomp.allow",
        "[seccomp]\nallow = [\"read\", \"opneat\"]",
        "2:18: seccomp.allow has \"opneat\", which is not a system call of this architecture; did you mean \"openat\"?",
    ),
    (
        "seccomp.allow",
        "[seccomp]\nallow = [\"unshare\"]",
        "2:10: seccomp.allow has \"unshare\", which is deadly in every profile; leave it out",
    ),
    (
        "seccomp.allow",
        "[seccomp]\nallow = [\"clone3\"]",
        "2:10: seccomp.allow has \"clone3\", whose flags no filter can read; ",
    ),
    (
        "seccomp.allow",
        "[seccomp]\nallow = [59]",
        "2:10: seccomp.allow is 59, which is not the name of a system call; ",
    ),
    (
        "seccomp.deny",
        "[seccomp]\ndeny = [\"SYS_read\"]",
        "2:9: seccomp.deny has \"SYS_read\", which is not a system call",
    ),
    (
        "seccomp.deny",
        "[seccomp]\nallow = [\"read\"]\ndeny = [\"read\"]",
        "3:9: seccomp.deny has \"read\", which allow has too; ",
    ),
    (
        "capabilities.keep",
        "[capabilities]\nkeep = [\"NET_RAW\", \"CAP_NET_RAWW\"]",
        "2:20: capabilities.keep has \"CAP_NET_RAWW\", which is not a capability; did you mean \"CAP_NET_RAW\"?",
    ),
    (
        "identity.user",
        "mode = \"direct\"\n[identity]\nuser = \"root\"",
        "3:8: identity.user is \"root\", which no call may run as; ",
    ),
    (
        "identity.user",
        "mode = \"direct\"\n[identity]\nuser = \"toor\"",
        "3:8: identity.user is \"toor\", which is root by another name; ",
    ),
    (
        "identity.user",
        "mode = \"direct\"\n[identity]\nuser = \"wheel\"",
        "3:8: identity.user is \"wheel\", whose primary group is root's; ",
    ),
    (
        "identity.user",
        "mode = \"direct\"\n[identity]\nuser = \"bob\"",
        "3:8: identity.user is \"bob\", and this host has no such user; ",
    ),
    (
        "identity.user",
        "mode = \"direct\"\n[identity]\nuser = \"0\"",
        "3:8: identity.user is \"0\", which is not the name of a user; ",
    ),
    (
        "identity.user",
        "[identity]\nuser = \"alice\"",
        "2:8: identity.user is \"alice\", which only direct mode can honour; ",
    ),
    (
        "environment.set",
        "[environment]\nset = { \"1A\" = \"x\" }",
        "2:9: environment.set is \"1A\", which is not the name of an environment variable; ",
    ),
    (
        "environment.set",
        "[environment]\nset = { DISPATCHER_NAMESPACE = \"x\" }",
        "2:9: environment.set has \"DISPATCHER_NAMESPACE\", which the dispatcher sets by itself; ",
    ),
    (
        "environment.set",
        "[environment.set]\nGRPC_INPUT_DATA = \"x\"",
        "2:1: environment.set has \"GRPC_INPUT_DATA\", which the",
    ),
    (
        "environment.set",
        "[environment.set]\nLISTEN_FDS = \"1\"",
        "2:1: environment.set has \"LISTEN_FDS\", which the",
    ),
    (
        "environment.set",
        "[environment.set]\nA = \"a\\u0000b\"",
        "2:5: environment.set.A contains a NUL character; ",
    ),
    (
        "environment.set",
        "[environment.set]\nA = 1",
        "2:5: environment.set.A is 1, which is not a text; write it in quotes",
    ),
    (
        "environment.set",
        "[environment]\nset = [\"A=b\"]",
        "2:7: environment.set is an array, which is not a table; write set = {",
    ),
    (
        "environment.allow",
        "[environment]\nallow = [\"A-B\"]",
        "2:10: environment.allow is \"A-B\", which is not the name of",
    ),
    (
        "environment.allow",
        "[environment]\nallow = [\"DISPATCHER_X\"]",
        "2:10: environment.allow has \"DISPATCHER_X\", which the",
    ),
    (
        "services.allow",
        "[services]\nallow = [\"greeter\"]",
        "2:10: services.allow has \"greeter\", which names no method; write SERVICE/METHOD",
    ),
    (
        "services.allow",
        "[services]\nallow = [\"a/b/c\"]",
        "2:10: services.allow has \"a/b/c\", which no service and method can match; ",
    ),
    (
        "services.allow",
        "[services]\nallow = [\"a/b\", \"*\"]",
        "2:17: services.allow has \"*\" beside another; ",
    ),
    (
        "services.allow",
        "[services]\nallow = [\"...\", \"a/b\"]",
        "2:9: services.allow has \"*\" beside another; ",
    ),
    (
        "artifacts.inline",
        "[artifacts]\ninline = 0",
        "2:10: artifacts.inline is 0, which is not true or false; ",
    ),
    (
        "artifacts.uris",
        "[artifacts]\nuris = [\"example.com/\"]",
        "2:9: artifacts.uris is \"example.com/\", which is not the beginning of a URI; ",
    ),
    (
        "artifacts.uris",
        "[artifacts]\nuris = [\"https://example.com\"]",
        "2:9: artifacts.uris has \"https://example.com\", which other hosts' names begin with too; write \"https://example.com/\"",
    ),
    (
        "artifacts.uris",
        "[artifacts]\nuris = [\"sha256:\"]",
        "2:9: artifacts.uris has \"sha256:\", but what is held needs no entry; ",
    ),
    (
        "artifacts.digests",
        "[artifacts]\ndigests = [\"sha256:12\"]",
        "2:12: artifacts.digests is \"sha256:12\", which is not a digest; ",
    ),
    (
        "artifacts.interpreters",
        "[artifacts]\ninterpreters = [\"python3\"]",
        "2:17: artifacts.interpreters is \"python3\", which is not an absolute path; ",
    ),
    (
        "admission.concurrency",
        "[admission]\nconcurrency = 0",
        "2:15: admission.concurrency is 0, which is not a whole number from 1 to 1000000; ",
    ),
    ("admission.queue", "[admission]\nqueue = -1", "2:9: admission.queue is -1, which"),
    (
        "admission.queue_timeout",
        "[admission]\nqueue_timeout = 1.5",
        "2:17: admission.queue_timeout is 1.5, which is not a duration; ",
    ),
    (
        "admission.rate",
        "[admission]\nrate = \"100\"",
        "2:8: admission.rate is \"100\", which is not a rate; write a number per s, m or h",
    ),
    (
        "admission.rate",
        "[admission]\nrate = 100",
        "2:8: admission.rate is 100, which is not a rate; ",
    ),
    (
        "container.image",
        "[container]\nimage = \"a b\"",
        "2:9: container.image is \"a b\", which is not the name of an image; ",
    ),
    (
        "container.runtime",
        "[container]\nruntime = \"/usr/bin/runsc\"",
        "2:11: container.runtime is \"/usr/bin/runsc\", which is not the name of a runtime; ",
    ),
    (
        "instances.min",
        "[instances]\nmin = 5",
        "2:7: instances.min is 5, more than instances.max, 4; ",
    ),
    (
        "instances.min",
        "[instances]\nmin = \"unlimited\"",
        "2:7: instances.min is \"unlimited\", which is not a whole number",
    ),
    ("instances.max", "[instances]\nmax = 0", "2:7: instances.max is 0, which"),
    (
        "instances.concurrency",
        "[instances]\nconcurrency = 0",
        "2:15: instances.concurrency is 0, which",
    ),
    (
        "instances.start_timeout",
        "[instances]\nstart_timeout = \"0ms\"",
        "2:17: instances.start_timeout is 0s, less",
    ),
    (
        "instances.idle_timeout",
        "[instances]\nidle_timeout = \"unlimited\"",
        "2:16: instances.idle_timeout is \"unlimited\", which",
    ),
    (
        "instances.max_requests",
        "[instances]\nmax_requests = 0",
        "2:16: instances.max_requests is 0, which",
    ),
    (
        "service",
        "[service.greeter]\noutput = \"any\"",
        "1:10: service has \"greeter\", which names no method; ",
    ),
    (
        "service",
        "[service.\"a/b\"]\nmode = \"direct\"",
        "2:1: unknown key \"mode\" in [service.\"a/b\"]; it belongs at the top, before the first [table] or in [network]",
    ),
    (
        "service",
        "[service.\"a/b\".filesystem]\nroot = \"host\"",
        "1:16: unknown table \"filesystem\" in [service.\"a/b\"]; write one of",
    ),
    (
        "service",
        "[service.\"a/b\".limits]\nmemory = 1",
        "2:10: service.\"a/b\".limits.memory is 1, less",
    ),
    (
        "service",
        "[service.\"a/b\".instances]\nmin = 9",
        "2:7: instances.min is 9, more than instances.max, 4; ",
    ),
    (
        "service",
        "[service.\"*\"]\n[service.\"*/*\"]",
        "2:10: [service.\"*/*\"] means the same as one before; ",
    ),
    ("service", "service = [1]", "1:11: service is an array, which is not a table; "),
    (
        "",
        "limits = 3",
        "1:10: limits is 3, which is not a table; write [limits] and its keys below",
    ),
    (
        "",
        "[limits]\nmemroy = 3",
        "2:1: unknown key \"memroy\" in [limits]; did you mean \"memory\"?",
    ),
    ("", "memory = \"1GiB\"", "1:1: unknown key \"memory\"; it belongs in [limits]"),
    (
        "",
        "[limits]\nallow = []",
        "2:1: unknown key \"allow\" in [limits]; it belongs in [seccomp] or in [environment] or in [services]",
    ),
    ("", "[limit]", "1:2: unknown table \"limit\"; did you mean \"limits\"?"),
    ("", "mode = \"jail", "1:13: not valid TOML: "),
    ("", "mode = \"jail\"\nmode = \"direct\"", "2:1: not valid TOML: duplicate key"),
];

#[test]
fn each_is_told_with_its_place_and_nothing_else_is() {
    let mut wrong = Vec::new();
    for (key, text, begin) in CASES {
        let faults = faults_of(text);
        if faults.len() != 1 || !faults[0].starts_with(begin) {
            wrong.push(format!("{key}: {text:?}\n  expected {begin:?}\n  got      {faults:?}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn no_key_is_left_out() {
    let tried: BTreeSet<&str> = CASES.iter().map(|(key, ..)| *key).collect();
    for key in describe() {
        let name = [key.table, key.key].join(".");
        let name = name.trim_start_matches('.');
        assert!(tried.contains(name), "no wrong value is tried for {name}");
    }
}

#[test]
fn every_fault_says_what_to_write_instead() {
    for (_, text, _) in CASES {
        for fault in faults_of(text) {
            let (_, help) = fault.rsplit_once("; ").unwrap();
            assert!(help.len() > 4 && !help.ends_with('.'), "{fault}");
        }
    }
}

#[test]
fn all_faults_come_at_once() {
    let all: String = [
        "mode = \"jial\"\nmood = 1\n",
        "[limits]\nmemory = \"1\"\npids = \"x\"\n",
        "[seccomp]\nallow = [\"unshare\", \"nope\", \"read\"]\n",
        "[capabilities]\nkeep = [\"x\", \"y\"]\n",
        "[services]\nallow = [\"*\", \"a/b\"]\n",
    ]
    .concat();
    let faults = faults_of(&all);
    let places: Vec<&str> = faults.iter().map(|fault| fault.split_once(": ").unwrap().0).collect();
    let expected = ["1:8", "2:1", "4:10", "5:8", "7:10", "7:21", "9:9", "9:14", "11:10"];
    assert_eq!(places, expected, "{faults:#?}");
}
