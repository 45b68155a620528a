//! Policies as a whole: what they become, and which rule holds for a call.

use std::time::Duration;

use super::{faults_of, load_files, policy_of};
use crate::{
    jail::{
        plan::{Allowed, Limits, Mode, Network, Root},
        seccomp::syscalls,
    },
    policy::{OutputFormat, Protocol},
    units::{Limit, MilliCpus, Rate},
};

#[test]
fn an_empty_file_means_the_built_in_defaults() {
    let empty = policy_of("");
    assert_eq!(empty.limits, Limits::default());
    assert_eq!(empty.mode, Mode::Jail);
    assert_eq!(empty.digest, policy_of(crate::policy::written::BUILT_IN).digest);
    assert_eq!(empty.digest, policy_of(include_str!("../testdata/defaults.toml")).digest);
}

#[test]
fn every_value_reaches_the_policy() {
    let policy = policy_of(
        r##"
        mode = "jail"
        allow_modes = ["direct"]
        protocol = "exec"
        output = "bytes"
        [limits]
        timeout = "unlimited"
        cpu_time = "1500ms"
        cpus = 2
        memory = 8388608
        swap = "unlimited"
        pids = "unlimited"
        open_files = 0x10
        output = "1m"
        [filesystem]
        root = "/srv//image/"
        tmp = "unlimited"
        tmp_exec = true
        bind = [{ source = "/srv/models/", target = "/models" }, { source = "/a", target = "/b", read_only = false }]
        [network]
        mode = "loopback"
        [seccomp]
        allow = ["io_uring_setup"]
        deny = ["socket"]
        [capabilities]
        keep = ["CAP_NET_RAW", "sys_nice"]
        [identity]
        user = "alice"
        [artifacts]
        inline = false
        uris = ["https://example.com/bin/", "docker:image"]
        digests = ["sha256:E3B0C44298FC1C149AFBF4C8996FB92427AE41E4649B934CA495991B7852B855"]
        [admission]
        rate = "30/m"
        queue = 0
        queue_timeout = "0s"
        [instances]
        start_timeout = "unlimited"
        idle_timeout = "1h"
        max_requests = 5
        "##,
    );
    assert_eq!(policy.allow_modes, [Mode::Direct]);
    assert_eq!(policy.output, OutputFormat::Bytes);
    assert_eq!(policy.limits.timeout, Limit::Unlimited);
    assert_eq!(policy.limits.cpu_time, Limit::At(Duration::from_millis(1500)));
    assert_eq!(policy.limits.cpus, Limit::At(MilliCpus(2000)));
    assert_eq!(policy.limits.memory, Limit::At(8 << 20));
    assert_eq!(policy.limits.swap, Limit::Unlimited);
    assert_eq!(policy.limits.pids, Limit::Unlimited);
    assert_eq!(policy.limits.open_files, Limit::At(16));
    assert_eq!(policy.limits.output, Limit::At(1 << 20));
    assert_eq!(policy.filesystem.root, Root::Directory("/srv/image".into()));
    assert_eq!(policy.filesystem.tmp, Some(Limit::Unlimited));
    assert!(policy.filesystem.tmp_exec);
    let binds = &policy.filesystem.binds;
    assert_eq!(binds[0].source.as_os_str(), "/srv/models");
    assert!(binds[0].read_only && !binds[1].read_only);
    assert_eq!(policy.network, Network::Loopback);
    let calls = &policy.syscalls.allowed;
    assert_eq!(calls.get(&syscalls::number("io_uring_setup").unwrap()), Some(&Allowed::Always));
    assert_eq!(calls.get(&syscalls::number("socket").unwrap()), None);
    assert_eq!(policy.keep_capabilities, [13, 23]);
    assert_eq!(policy.user, "alice");
    assert!(!policy.artifacts.inline);
    assert_eq!(policy.artifacts.digests, [crate::names::Digest::of(b"")]);
    assert_eq!(policy.admission.rate, Limit::At(Rate(0.5)));
    assert_eq!(policy.admission.queue, Limit::At(0));
    assert_eq!(policy.admission.queue_timeout, Limit::At(Duration::ZERO));
    assert_eq!(policy.instances.start_timeout, Limit::Unlimited);
    assert_eq!(policy.instances.idle_timeout, Limit::At(Duration::from_secs(3600)));
    assert_eq!(policy.instances.max_requests, Limit::At(5));
}

#[test]
fn templates_carry_what_the_launcher_needs() {
    let loaded = load_files(&[
        ("boxes.toml", "mode = \"container\"\n"),
        (
            "both.toml",
            "allow_modes = [\"direct\", \"jail\"]\n[service.\"a/b\"]\nargv = \"plain\"\n",
        ),
        ("jail.toml", "[environment]\nallow = [\"X\"]\n"),
        ("trusted.toml", "mode = \"direct\"\n[identity]\nuser = \"alice\"\n"),
    ])
    .unwrap();
    let templates = &loaded.templates.templates;
    let ids: Vec<(&str, u32)> =
        templates.iter().map(|one| (one.id.policy.as_str(), one.id.variant)).collect();
    assert_eq!(ids, [("both", 0), ("both", 1), ("boxes", 0), ("jail", 0), ("trusted", 0)]);
    assert_eq!(templates[0].modes, [Mode::Direct, Mode::Jail]);
    assert_eq!(templates[0].user.as_ref().unwrap().uid, 65_534);
    assert_eq!(templates[2].modes, [Mode::Container]);
    assert_eq!(templates[3].modes, [Mode::Jail]);
    assert_eq!(templates[3].user, None);
    assert_eq!(templates[3].environment_allow, ["X"]);
    assert_eq!(templates[4].modes, [Mode::Direct]);
    assert_eq!(templates[4].user.as_ref().unwrap().name, "alice");
    assert_eq!(loaded.templates.digest, loaded.set.digest);
    // What the compiler hands on survives the way it is handed on.
    let bytes = postcard::to_stdvec(&loaded.set).unwrap();
    assert_eq!(postcard::from_bytes::<crate::policy::PolicySet>(&bytes).unwrap(), loaded.set);
}

#[test]
fn direct_mode_refuses_what_it_cannot_honour_and_only_that() {
    let direct = "mode = \"direct\"\n";
    for table in [
        "[filesystem]\ntmp = \"64MiB\"",
        "[network]\nmode = \"none\"",
        "[network]\nmode = \"loopback\"",
        "[seccomp]\ndeny = []",
        "[capabilities]\nkeep = []",
    ] {
        let faults = faults_of(&format!("{direct}{table}"));
        assert_eq!(faults.len(), 1, "{table} {faults:?}");
        assert!(faults[0].starts_with("3:"), "{faults:?}");
        assert!(faults[0].contains("can't be honoured in direct mode"), "{faults:?}");
    }
    for table in ["", "[network]\nmode = \"host\"", "[limits]\npids = 3", "[identity]\nuser = \"\""]
    {
        assert_eq!(faults_of(&format!("{direct}{table}")), [""; 0], "{table}");
    }
}

#[test]
fn container_mode_refuses_what_docker_cannot_do() {
    for (content, begin) in [
        (
            "mode = \"container\"\n[capabilities]\nkeep = [\"CAP_CHOWN\"]",
            "3:9: capabilities.keep can't",
        ),
        ("allow_modes = [\"container\"]\n[capabilities]\nkeep = [\"CAP_CHOWN\"]", "3:9: "),
        (
            "mode = \"container\"\n[filesystem]\nbind = [{ source = \"/srv\", target = \"/srv\", read_only = false }]",
            "3:9: filesystem.bind can't be honoured for writing",
        ),
        (
            "mode = \"container\"\n[filesystem]\nroot = \"host\"\n[container]\nimage = \"debian:12\"",
            "3:8: filesystem.root can't",
        ),
        ("[container]\npull = true", "2:8: container.pull is true"),
        ("mode = \"container\"\n[limits]\nmemory = \"5MiB\"", "3:10: limits.memory is less"),
        (
            "mode = \"container\"\n[service.\"a/b\"]\nlimits = { memory = \"5MiB\" }",
            "3:21: limits.memory is less",
        ),
        (
            "mode = \"container\"\n[filesystem]\nbind = [{ source = \"/srv\", target = \"/etc\" }]",
            "3:9: filesystem.bind has the target \"/etc\"",
        ),
        (
            "mode = \"container\"\n[filesystem]\nbind = [{ source = \"/srv\", target = \"/sys/x\" }]",
            "3:9: filesystem.bind has the target \"/sys/x\"",
        ),
        ("mode = \"container\"\n[limits]\ncpus = 0.009", "3:8: limits.cpus is less"),
        ("mode = \"container\"\n[limits]\nmemory = \"unlimited\"", "3:10: limits.swap can't"),
        (
            "mode = \"container\"\n[limits]\nmemory = \"unlimited\"\nswap = \"1MiB\"",
            "4:8: limits.swap can't",
        ),
    ] {
        let faults = faults_of(content);
        assert_eq!(faults.len(), 1, "{content} {faults:?}");
        assert!(faults[0].starts_with(begin), "{faults:?}");
    }
    for content in [
        "mode = \"container\"\n[container]\nimage = \"debian:12\"\npull = true",
        "mode = \"container\"\n[filesystem]\nroot = \"host\"",
        "[capabilities]\nkeep = [\"CAP_CHOWN\"]",
        "[limits]\ncpus = 0.001\nmemory = \"unlimited\"",
        "[filesystem]\nbind = [{ source = \"/srv\", target = \"/etc\" }]",
        "mode = \"container\"\n[filesystem]\nbind = [{ source = \"/srv\", target = \"/etc/ssl\" }]",
        "mode = \"container\"\n[limits]\ncpus = 0.01\nmemory = \"unlimited\"\nswap = \"unlimited\"",
        // More processors than there may be.
        "mode = \"container\"\n[limits]\ncpus = 512",
    ] {
        assert_eq!(faults_of(content), [""; 0], "{content}");
    }
}

#[test]
fn nothing_is_bound_where_a_service_has_its_socket() {
    let bound = |target: &str, rest: &str| {
        faults_of(&format!(
            "{rest}\n[filesystem]\nbind = [{{ source = \"/srv\", target = \"{target}\" }}]\n"
        ))
    };
    let grpc = "protocol = \"grpc\"";
    let special = "service.\"a.B/*\" = { protocol = \"grpc\" }";
    for rest in [grpc, special] {
        for target in ["/run/grpc", "/run/grpc/inside"] {
            let faults = bound(target, rest);
            assert_eq!(faults.len(), 1, "{target} {faults:?}");
            assert!(faults[0].starts_with("3:9: filesystem.bind has the target"), "{faults:?}");
        }
        assert_eq!(bound("/run/grpc2", rest), [""; 0]);
    }
    // Others have nothing there.
    assert_eq!(bound("/run/grpc", ""), [""; 0]);
}

#[test]
fn a_wrong_mode_makes_no_further_faults() {
    let faults = faults_of("mode = \"dircet\"\n[identity]\nuser = \"alice\"\n");
    assert_eq!(faults.len(), 1, "{faults:?}");
    let faults = faults_of("[instances]\nmin = 5\nmax = \"x\"\n");
    assert_eq!(faults.len(), 1, "{faults:?}");
}

#[test]
fn surprising_policies_are_warned_about() {
    let warnings = |content: &str| -> Vec<String> {
        let loaded = load_files(&[("p.toml", content)]).unwrap();
        let shown = loaded.warnings.iter().map(ToString::to_string);
        shown.map(|text| text.rsplit_once("p.toml:").unwrap().1.to_owned()).collect()
    };
    for (content, begin) in [
        ("[limits]\noutput = \"4MiB\"", "2:10: limits.output is above 3.9MiB"),
        ("[limits]\noutput = \"unlimited\"", "2:10: limits.output is above"),
        (
            "allow_modes = [\"direct\"]\n[network]\nmode = \"loopback\"",
            "3:8: network.mode can't be honoured for calls that ask for direct mode",
        ),
        ("[service.\"a/b\"]\nlimits = { output = \"5MiB\" }", "2:21: limits.output is above"),
        ("protocol = \"grpc\"\nlimits.cpu_time = \"5s\"", "2:19: limits.cpu_time doesn't apply"),
        ("protocol = \"grpc\"\ninstances.min = 1", "2:17: instances.min is for executables"),
        (
            "[artifacts]\ninterpreters = [\"/bin/sh\"]",
            "2:17: artifacts.interpreters has \"/bin/sh\"",
        ),
    ] {
        let warnings = warnings(content);
        assert_eq!(warnings.len(), 1, "{content} {warnings:?}");
        assert!(warnings[0].starts_with(begin), "{warnings:?}");
    }
    for content in [
        "[limits]\noutput = \"3.9MiB\"",
        "protocol = \"grpc\"",
        "[filesystem]\nroot = \"host\"\n[artifacts]\ninterpreters = [\"/bin/sh\"]",
        "mode = \"direct\"\n[artifacts]\ninterpreters = [\"/bin/sh\"]",
        "[filesystem]\nbind = [{ source = \"/opt/py\", target = \"/py\" }]\n\
         [artifacts]\ninterpreters = [\"/py/bin/python\"]",
    ] {
        assert_eq!(warnings(content), [""; 0], "{content}");
    }
    assert_eq!(policy_of("protocol = \"grpc\"").protocol, Protocol::Grpc);
}

#[test]
fn direct_programs_of_the_user_of_containers_are_warned_about() {
    let warnings = |direct: &str, other: &str| -> Vec<String> {
        let loaded = load_files(&[("d.toml", direct), ("c.toml", other)]).unwrap();
        loaded.warnings.iter().map(ToString::to_string).collect()
    };
    let (direct, container) = ("mode = \"direct\"\n", "mode = \"container\"\n");
    for (one, other) in [
        (direct, container),
        (direct, "allow_modes = [\"container\"]\n"),
        ("allow_modes = [\"direct\"]\n", container),
        ("mode = \"direct\"\n[identity]\nuser = \"nobody\"\n", container),
    ] {
        let warnings = warnings(one, other);
        assert_eq!(warnings.len(), 1, "{one} {warnings:?}");
        let says = ["d.toml:", "run as nobody", "the policy c allows", "[identity] user"];
        assert!(says.iter().all(|says| warnings[0].contains(says)), "{warnings:?}");
    }
    let alice = "mode = \"direct\"\n[identity]\nuser = \"alice\"\n";
    for (one, other) in [(alice, container), (direct, ""), ("", container)] {
        assert_eq!(warnings(one, other), [""; 0], "{one} {other}");
    }
}

#[test]
fn an_empty_directory_is_a_warning() {
    let loaded = load_files(&[]).unwrap();
    assert_eq!(loaded.warnings.len(), 1);
    assert!(loaded.warnings[0].message.contains("every call is refused"));
}

#[test]
fn the_environment_is_bounded() {
    let of = |length: usize| format!("[environment]\nset = {{ A = \"{}\" }}\n", "x".repeat(length));
    // Beside A there are the built-in ones.
    let built_in: usize =
        policy_of("").environment.iter().map(|(name, value)| name.len() + value.len() + 2).sum();
    let most = (128 << 10) - built_in - 3;
    assert_eq!(faults_of(&of(most)), [""; 0]);
    let faults = faults_of(&of(most + 1));
    assert_eq!(
        faults,
        [format!(
            "2:7: environment.set is {} bytes; keep it, and the arguments of calls, below 128KiB",
            (128 << 10) + 1
        )]
    );
}

#[test]
fn the_most_specific_override_holds() {
    let loaded = load_files(&[
        (
            "demo.toml",
            "argv = \"plain\"\n\
             [service.\"*/*\"]\nlimits = { pids = 1 }\n\
             [service.\"a.B/*\"]\nlimits = { pids = 2 }\n\
             [service.\"*/Get\"]\nlimits = { pids = 3 }\n\
             [service.\"a.B/Get\"]\nlimits = { pids = 4 }\n\
             [service.\"a.*/Get\"]\nlimits = { pids = 5 }\n\
             [service.\"x?/y\"]\nlimits = { pids = 6 }\n\
             [service.\"?x/y\"]\nlimits = { pids = 7 }\n\
             [services]\nallow = [\"a.*/*\", \"x*/y\"]\n",
        ),
        ("default.toml", "[limits]\npids = 9\n"),
    ])
    .unwrap();
    let choose = |namespace: &str, service: &str, method: &str| {
        let policy = loaded.set.choose(&namespace.parse().unwrap(), service, method).unwrap();
        (policy.limits.pids.finite().unwrap(), policy.serves(service, method))
    };
    assert_eq!(choose("demo", "a.B", "Get"), (4, true));
    assert_eq!(choose("demo", "a.B", "Put"), (2, true));
    assert_eq!(choose("demo", "a.C", "Get"), (5, true));
    assert_eq!(choose("demo", "b", "Get"), (3, false));
    assert_eq!(choose("demo", "b", "Put"), (1, false));
    assert_eq!(choose("demo", "xx", "y"), (6, true), "of equals, the first");
    assert_eq!(choose("other", "b", "Put"), (9, true));
    let none = load_files(&[("demo.toml", "")]).unwrap();
    assert!(none.set.choose(&"other".parse().unwrap(), "a", "b").is_none());
}

#[test]
fn digests_are_of_the_content() {
    let digest = |content: &str| policy_of(content).digest;
    assert_eq!(digest(""), digest("# a comment\nmode='jail'"));
    assert_eq!(digest("[limits]\nmemory = \"1GiB\""), digest("limits.memory = \"1024M\""));
    assert_ne!(digest(""), digest("[limits]\nmemory = \"1GiB\""));
    assert_ne!(digest(""), digest("[seccomp]\ndeny = [\"socket\"]"));
    let one = load_files(&[("a.toml", ""), ("b.toml", "")]).unwrap();
    assert_eq!(one.set.policies["a"].base.digest, one.set.policies["b"].base.digest);
    let set = |files: &[(&str, &str)]| load_files(files).unwrap().set.digest;
    assert_eq!(set(&[("a.toml", "")]), set(&[("a.toml", "# other words")]));
    assert_ne!(set(&[("a.toml", "")]), set(&[("b.toml", "")]));
    assert_ne!(set(&[("a.toml", "")]), set(&[("a.toml", "[service.\"a/b\"]\nargv = \"plain\"")]));
}

#[test]
fn too_many_overrides_are_a_fault() {
    let tables = |number: usize| -> String {
        (0..number).map(|index| format!("[service.\"a/m{index}\"]\n")).collect()
    };
    assert_eq!(faults_of(&tables(256)), [""; 0]);
    let faults = faults_of(&tables(300));
    assert_eq!(faults.len(), 1);
    assert!(faults[0].starts_with("257:10: more than 256 [service] tables; "), "{faults:?}");
}
