//! What a program finds inside a jail, in each kind of root and network.

mod common;

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    sync::OnceLock,
    time::Duration,
};

use common::{
    Call, Dispatcher, Facts,
    dispatcher::{best_effort, plain},
    not_here, programs, rootless, shared, token, wait_until,
};
use dispatcher::wire::{Verdict, status::Code};
use nix::sys::signal::Signal;

/// A directory of the test's own that policies refer to.
fn fixtures() -> &'static Path {
    static FIXTURES: OnceLock<tempfile::TempDir> = OnceLock::new();
    FIXTURES
        .get_or_init(|| {
            let directory = tempfile::tempdir().unwrap();
            let make = |name: &str, mode: u32| {
                let path = directory.path().join(name);
                fs::create_dir_all(&path).unwrap();
                fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
                path
            };
            fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
            make("root", 0o755);
            fs::write(make("root/data", 0o755).join("marker"), "in the directory root").unwrap();
            fs::write(make("models", 0o755).join("weights"), "in the models").unwrap();
            fs::write(make("secret", 0o700).join("key"), "owner only").unwrap();
            let work = make("work", 0o700);
            if !rootless() {
                std::os::unix::fs::chown(work, Some(12345), Some(12345)).unwrap();
                make("roots", 0o755);
            }
            directory
        })
        .path()
}

fn fixture(name: &str) -> PathBuf {
    fixtures().join(name)
}

fn dispatcher() -> &'static Dispatcher {
    static SERVER: OnceLock<Dispatcher> = OnceLock::new();
    shared(&SERVER, || {
        let bind = |name: &str, target: &str, read_only: bool| {
            let source = fixture(name);
            plain(&format!(
                "[filesystem]\nbind = [{{ source = {source:?}, target = {target:?}, read_only = {read_only} }}]\n"
            ))
        };
        let root = fixture("root");
        Dispatcher::start([
            ("empty", plain("")),
            ("host", plain("[filesystem]\nroot = \"host\"\n")),
            ("directory", plain(&format!("[filesystem]\nroot = {root:?}\n"))),
            ("bound", bound_programs()),
            ("loopback", plain("[network]\nmode = \"loopback\"\n")),
            ("hostnet", plain("[network]\nmode = \"host\"\n")),
            ("models", bind("models", "/models", true)),
            ("secret", bind("secret", "/secret", true)),
            ("work", bind("work", "/srv/jobs", false)),
            ("roots", bind("roots", "/srv/jobs", false)),
            ("no-tmp", plain("[filesystem]\ntmp = \"none\"\n")),
            ("small-tmp", plain("[filesystem]\ntmp = \"4MiB\"\n")),
            ("exec-tmp", plain("[filesystem]\ntmp_exec = true\n")),
            ("keep", plain("[capabilities]\nkeep = [\"CAP_NET_BIND_SERVICE\"]\n")),
            ("environment", plain("[environment]\nset = { A = \"1\", B = \"two words\" }\n")),
            ("limits", plain("[limits]\nopen_files = 33\nfile_size = \"1MiB\"\n")),
        ])
    })
}

/// An empty root with what dynamic programs and shell scripts need, bound read-only.
fn bound_programs() -> String {
    let mut binds = vec![];
    for shown in [LOADER, "/lib/x86_64-linux-gnu", "/bin/sh"] {
        // A link is not bound; what it leads to, under the link's name, is.
        if let Ok(source) = fs::canonicalize(shown) {
            binds.push(format!("{{ source = {source:?}, target = {shown:?}, read_only = true }}"));
        }
    }
    plain(&format!(
        "[filesystem]\nbind = [{}]\n[artifacts]\ninterpreters = [\"/bin/sh\"]\n",
        binds.join(", ")
    ))
}

const LOADER: &str = "/lib64/ld-linux-x86-64.so.2";

#[track_caller]
fn inside(namespace: &str, chapters: &[&str]) -> Facts {
    dispatcher().run(namespace, "facts", chapters).ok().facts()
}

/// All facts of the default jail, asked once.
fn empty() -> &'static Facts {
    static FACTS: OnceLock<Facts> = OnceLock::new();
    FACTS.get_or_init(|| inside("empty", &[]))
}

fn set<const N: usize>(words: [&str; N]) -> BTreeSet<&str> {
    words.into()
}

/// The probe is worth something only if it finds what is there to be found.
#[test]
fn outside_the_probe_finds_everything() {
    let facts = programs::outside("facts", &[]).facts();
    assert_eq!(facts.one("seccomp"), "0");
    assert_eq!(facts.one("see /proc/sys"), "ok");
    assert_eq!(facts.one("see /proc/1/cmdline"), "ok");
    assert_eq!(facts.one("open-rw /proc/self/mem"), "ok");
    assert_eq!(facts.one("rlimit.core.set"), "ok");
    assert!(facts.all("proc.entry").len() > 10);
    assert!(facts.all("root").len() > 8);
    assert!(facts.all("writable").contains(&"/tmp"));
    assert!(facts.all("dev").len() > 8);
    if !rootless() {
        assert_eq!(facts.one("uid"), "0 0 0");
        assert_ne!(facts.one("cap.effective"), "0");
        assert_eq!(facts.one("setgroups.0"), "ok");
    }
}

#[test]
fn identity_is_nobody_with_nothing() {
    let facts = empty();
    assert_eq!(facts.one("uid"), "65534 65534 65534");
    assert_eq!(facts.one("gid"), "65534 65534 65534");
    if !rootless() {
        assert_eq!(facts.one("groups.count"), "0");
    }
    assert!(facts.all("group").iter().all(|group| *group == "65534"), "unmapped groups only");
    for attempt in ["setuid.0", "setgid.0", "setgroups.0"] {
        assert_ne!(facts.one(attempt), "ok", "{attempt}");
    }
    for set in ["effective", "permitted", "inheritable", "bounding", "ambient"] {
        assert_eq!(facts.one(&format!("cap.{set}")), "0", "{set}");
    }
    assert_eq!(facts.one("no_new_privs"), "1");
    assert_eq!(facts.one("seccomp"), "2");
}

#[test]
fn a_kept_capability_is_the_only_one() {
    let reply = dispatcher().run("keep", "facts", &["capabilities"]).ok();
    let facts = reply.facts();
    for set in ["effective", "permitted", "bounding"] {
        assert_eq!(facts.one(&format!("cap.{set}")), "400", "CAP_NET_BIND_SERVICE in {set}");
    }
    assert!(
        !reply.report.enforced.contains(&"caps.none".to_owned()),
        "{:?}",
        reply.report.enforced
    );
}

#[test]
fn only_the_standard_descriptors_are_open() {
    for namespace in ["empty", "host", "directory", "loopback", "hostnet", "work"] {
        if namespace == "work" && rootless() {
            continue;
        }
        let facts = inside(namespace, &["descriptors"]);
        assert_eq!(facts.all("fd"), ["0", "1", "2"], "{namespace}: {:?}", facts.all("fd.kind"));
        for kind in facts.all("fd.kind") {
            assert!(
                !kind.ends_with("directory") && !kind.ends_with("device"),
                "{namespace}: {kind}"
            );
        }
    }
}

#[test]
fn the_process_stands_alone() {
    let facts = empty();
    assert_eq!(facts.one("cwd"), "/");
    assert_eq!(facts.one("ppid"), "1");
    assert!((2..=9).contains(&facts.number("pid")), "pid {}", facts.one("pid"));
    assert_eq!(facts.one("sid.own"), "yes");
    assert_ne!(facts.one("tty"), "ok");
    assert_eq!(facts.all("signal.blocked"), [""; 0]);
    assert_eq!(facts.all("signal.ignored"), [""; 0]);
    assert_ne!(facts.one("sethostname"), "ok");
    assert_ne!(facts.one("nice.raise"), "ok");
    let host = nix::unistd::gethostname().unwrap();
    assert_ne!(facts.one("hostname"), host.to_str().unwrap());
    assert_ne!(facts.one("hostname"), "");
}

#[test]
fn every_namespace_is_its_own() {
    let (first, second) = (empty(), inside("empty", &["namespaces"]));
    for name in ["user", "mnt", "pid", "ipc", "uts", "net", "cgroup"] {
        let host = fs::read_link(format!("/proc/self/ns/{name}")).unwrap();
        let key = format!("ns.{name}");
        assert_ne!(first.one(&key), host.to_str().unwrap(), "{name} is the host's");
        // Numbers of namespaces that are gone are given out again, so two runs
        // one after the other may well show the same one.
        assert!(second.one(&key).starts_with(name), "{name}: {}", second.one(&key));
    }
    for path in first.all("cgroup") {
        assert!(!path.contains("dispatcher"), "the cgroup's path tells of the host: {path}");
    }
}

#[test]
fn only_tmp_can_be_written() {
    for namespace in ["empty", "host", "directory"] {
        let facts = inside(namespace, &["root"]);
        assert_eq!(facts.set("writable"), set(["/tmp"]), "{namespace}");
        assert_eq!(facts.set("mkdir"), set(["/tmp"]), "{namespace}");
        assert_eq!(facts.one("root.escape"), "no", "{namespace}");
        assert_ne!(facts.one("chmod.root"), "ok", "{namespace}");
    }
}

#[test]
fn the_empty_root_holds_nothing_else() {
    let allowed = set(["dev", "proc", "tmp", "run", "etc", "sys"]);
    let found = empty().set("root");
    assert!(found.is_superset(&set(["dev", "proc", "tmp"])), "{found:?}");
    assert!(found.is_subset(&allowed), "{found:?}");
    let listing =
        dispatcher().run("empty", "act", &["ls", "/run", "ls", "/etc", "ls", "/sys"]).ok();
    for directory in ["/run", "/etc", "/sys"] {
        let entries = listing.facts();
        let entries = entries.all(directory);
        assert!(entries.is_empty() || entries == ["ENOENT"], "{directory}: {entries:?}");
    }
}

#[test]
fn devices_are_the_five_harmless_ones() {
    let expected = set(["null c 1:3", "zero c 1:5", "full c 1:7", "random c 1:8", "urandom c 1:9"]);
    for namespace in ["empty", "host", "directory"] {
        let facts = inside(namespace, &["devices"]);
        assert_eq!(facts.set("dev"), expected, "{namespace}");
        assert_eq!(facts.one("dev.null.write"), "ok");
        assert_eq!(facts.one("dev.null.read"), "0");
        assert_eq!(facts.one("dev.zero.read"), "16");
        assert_eq!(facts.one("dev.full.write"), "ENOSPC");
        assert_eq!(facts.one("dev.urandom.read"), "16");
        assert_ne!(facts.one("mknod.block"), "ok", "{namespace}");
        assert_ne!(facts.one("mknod.char"), "ok", "{namespace}");
    }
}

#[test]
fn proc_shows_oneself_and_changes_nothing() {
    for namespace in ["empty", "host", "directory"] {
        let facts = inside(namespace, &["proc", "mounts"]);
        for (path, seen) in facts.under("see ") {
            assert_eq!(seen, "ENOENT", "{namespace}: {path}");
        }
        for (path, opened) in facts.under("open-rw ") {
            assert_ne!(opened, "ok", "{namespace}: {path}");
        }
        assert!(facts.set("proc.entry").is_subset(&set(["self", "thread-self"])), "{namespace}");
        let proc = mount(&facts, "/proc").expect("/proc is mounted");
        assert_eq!(proc[1], "proc");
        assert!(has(&proc[2], "ro"), "{namespace}: {proc:?}");
        assert!(has(&proc[3], "subset=pid"), "{namespace}: {proc:?}");
        assert!(has(&proc[3], "hidepid=invisible"), "{namespace}: {proc:?}");
    }
}

/// The mount on exactly this point: point, type, its options, the file system's options.
fn mount(facts: &Facts, point: &str) -> Option<Vec<String>> {
    let mounts = facts.all("mount");
    let mut fields =
        mounts.iter().map(|line| line.split(' ').map(str::to_owned).collect::<Vec<_>>());
    fields.rfind(|fields| fields[0] == point)
}

fn has(options: &str, option: &str) -> bool {
    options.split(',').any(|one| one == option)
}

#[test]
fn no_mount_gives_more_than_it_must() {
    for namespace in ["empty", "host", "directory"] {
        let facts = inside(namespace, &["mounts"]);
        assert_eq!(facts.one("mountinfo"), "ok");
        for line in facts.all("mount") {
            let fields: Vec<_> = line.split(' ').collect();
            assert!(!line.contains("cgroup") && !line.contains("sysfs"), "{namespace}: {line}");
            if fields[0].starts_with("/dev/") {
                continue; // one of the five devices, shown as the host has it
            }
            assert!(has(fields[2], "nosuid"), "{namespace}: {line}");
            assert!(has(fields[2], "nodev") || fields[0] == "/dev", "{namespace}: {line}");
            assert!(has(fields[2], "ro") || fields[0] == "/tmp", "{namespace}: {line}");
        }
    }
}

#[test]
fn limits_are_set_and_stay() {
    let facts = empty();
    assert_eq!(facts.one("rlimit.core"), "1 1");
    assert_eq!(facts.one("rlimit.core.after"), "1 1");
    for attempt in ["rlimit.core.set", "rlimit.core.prlimit", "rlimit.core.prlimit.self"] {
        assert_eq!(facts.one(attempt), "EPERM", "{attempt}");
    }
    assert_eq!(facts.one("rlimit.nofile"), "256 256");
    assert_ne!(facts.one("rlimit.nofile.raise"), "ok");
    assert_eq!(facts.one("rlimit.fsize"), format!("{0} {0}", 64 << 20));
    assert_eq!(facts.one("rlimit.rtprio"), "0 0");
    assert_eq!(facts.one("rlimit.nice"), "0 0");

    let facts = inside("limits", &["limits"]);
    assert_eq!(facts.one("rlimit.nofile"), "33 33");
    assert_eq!(facts.one("rlimit.fsize"), format!("{0} {0}", 1 << 20));
}

#[test]
fn tmp_is_as_the_policy_says() {
    let facts = empty();
    assert_eq!(facts.number("tmp.bytes"), 64 << 20);
    for option in ["tmp.noexec", "tmp.nosuid", "tmp.nodev"] {
        assert_eq!(facts.one(option), "yes", "{option}");
    }
    assert!((1..10_000_000).contains(&facts.number("tmp.inodes")), "inodes are bounded");
    assert_eq!(inside("small-tmp", &["root"]).number("tmp.bytes"), 4 << 20);
    let open = inside("exec-tmp", &["root"]);
    assert_eq!(open.one("tmp.noexec"), "no");
    assert_eq!(open.one("tmp.nosuid"), "yes");
    let without = inside("no-tmp", &["root"]);
    assert_eq!(without.all("writable"), [""; 0]);
}

/// Address families that answered with anything but "no such thing".
fn families(facts: &Facts) -> BTreeSet<u32> {
    facts.under("socket.").map(|(key, _)| key.split('.').next().unwrap().parse().unwrap()).collect()
}

#[test]
fn network_none_has_nothing_to_talk_to() {
    let facts = empty();
    let found = families(facts);
    assert!(found.is_subset(&[1, 16].into()), "families {found:?}");
    assert!(found.contains(&1));
    assert!(facts.set("interface").is_subset(&set(["lo"])));
    assert_eq!(facts.one("lo"), "EAFNOSUPPORT");
}

#[test]
fn network_loopback_has_a_lo_of_its_own() {
    let facts = inside("loopback", &["network", "namespaces"]);
    let found = families(&facts);
    assert!(found.is_subset(&[1, 2, 10, 16].into()), "families {found:?}");
    assert!(found.is_superset(&[1, 2].into()), "families {found:?}");
    assert_eq!(facts.set("interface"), set(["lo"]));
    assert_eq!(facts.one("lo"), "up");
    let host = fs::read_link("/proc/self/ns/net").unwrap();
    assert_ne!(facts.one("ns.net"), host.to_str().unwrap());
}

#[test]
fn network_host_is_the_hosts() {
    let reply = dispatcher().run("hostnet", "facts", &["network", "namespaces"]).ok();
    let facts = reply.facts();
    assert!(families(&facts).is_subset(&[1, 2, 10, 16].into()), "{:?}", families(&facts));
    let host = fs::read_link("/proc/self/ns/net").unwrap();
    assert_eq!(facts.one("ns.net"), host.to_str().unwrap());
    assert!(!reply.report.enforced.contains(&"ns.net".to_owned()), "{:?}", reply.report.enforced);
}

#[test]
fn the_host_root_shows_programs_and_little_of_etc() {
    let reply =
        dispatcher().run("host", "act", &["ls", "/", "ls", "/etc", "cat", "/etc/passwd"]).ok();
    let facts = reply.facts();
    let allowed = set([
        "bin", "dev", "etc", "lib", "lib32", "lib64", "libx32", "opt", "proc", "run", "sbin",
        "sys", "tmp", "usr",
    ]);
    assert!(facts.set("/").is_subset(&allowed), "{:?}", facts.set("/"));
    assert!(facts.set("/").is_superset(&set(["bin", "dev", "etc", "proc", "tmp", "usr"])));
    for entry in facts.all("/etc") {
        let known = set([
            "alternatives",
            "group",
            "hosts",
            "ld.so.cache",
            "localtime",
            "nsswitch.conf",
            "passwd",
            "resolv.conf",
            "ssl",
        ]);
        assert!(known.contains(entry) || entry.starts_with("ld.so.conf"), "/etc/{entry}");
    }
    let passwd = reply.text();
    assert!(passwd.contains(":65534:65534:"), "passwd knows who we are: {passwd}");
    let own = nix::unistd::User::from_uid(1000.into()).ok().flatten();
    assert!(own.is_none_or(|user| !passwd.contains(&user.name)), "passwd is made up");
    assert_eq!(
        dispatcher().run("host", "attack", &["read-file", "/etc/shadow"]).ok().text(),
        "read-file=refused ENOENT\n"
    );
}

#[test]
fn dynamic_programs_run_in_the_host_root() {
    let reply = dispatcher().run("host", "act-dynamic", &["print", "linked"]).ok();
    assert_eq!(reply.text(), "linked");
    dispatcher()
        .run("empty", "act-dynamic", &["print", "linked"])
        .refused(Code::InvalidArgument, "loader_missing");
}

/// Also where Landlock says over again what may be executed.
#[test]
fn loader_and_interpreter_may_be_bound() {
    let reply = dispatcher().run("bound", "act-dynamic", &["print", "linked"]).ok();
    assert_eq!(reply.text(), "linked");
    let script = Call::of("bound", "#!/bin/sh\necho interpreted\n");
    assert_eq!(dispatcher().call(script).ok().text(), "interpreted\n");
}

#[test]
fn a_directory_root_shows_that_directory() {
    let reply = dispatcher()
        .run("directory", "act", &["cat", "/data/marker", "write", "/data/x", "y"])
        .ok();
    assert!(reply.text().starts_with("in the directory root"), "{}", reply.text());
    assert_eq!(reply.facts().all("/data/x").len(), 0);
    assert!(reply.text().contains("/data/x=EROFS"), "{}", reply.text());
    let left: Vec<_> = fs::read_dir(fixture("root")).unwrap().flatten().collect();
    assert_eq!(left.len(), 1, "nothing was made in the host's directory: {left:?}");
}

#[test]
fn read_only_binds_show_and_refuse() {
    let reply = dispatcher()
        .run("models", "act", &["cat", "/models/weights", "print", "\n", "write", "/models/x", "y"])
        .ok();
    assert!(reply.text().starts_with("in the models"), "{}", reply.text());
    assert_eq!(reply.facts().one("/models/x"), "EROFS");
    assert!(!fixture("models/x").exists());
}

/// What can't be had without idmapped mounts is refused, never shown half.
#[test]
fn private_binds_act_as_their_owner_or_not_at_all() {
    let reply = dispatcher().run("secret", "act", &["cat", "/secret/key"]);
    if reply.verdict == Verdict::Refused {
        assert!(rootless(), "{}", reply.summary());
        reply.refused(Code::FailedPrecondition, "control_unavailable");
        return;
    }
    assert_eq!(reply.ok().text(), "owner only");

    let reply = dispatcher().run("work", "act", &["write", "/srv/jobs/result", "made inside"]).ok();
    assert_eq!(reply.facts().one("/srv/jobs/result"), "ok");
    let made = fixture("work/result");
    assert_eq!(fs::read_to_string(&made).unwrap(), "made inside");
    let (owner, file) = (fs::metadata(fixture("work")).unwrap(), fs::metadata(&made).unwrap());
    assert_eq!(
        (file.uid(), file.gid()),
        (owner.uid(), owner.gid()),
        "owned by the directory's owner"
    );
    let again = dispatcher().run("work", "act", &["cat", "/srv/jobs/result"]).ok();
    assert_eq!(again.text(), "made inside", "the next run reads it too, whatever uid it drew");
}

/// Writing as root into root's directory, but nothing that makes one root.
#[test]
fn no_run_leaves_a_set_user_id_file() {
    let directory = tempfile::tempdir().unwrap();
    let outside = programs::outside_in(directory.path(), "attack", &["setuid-bit", "."]);
    assert_eq!(outside.facts().one("setuid-bit"), "works");
    if rootless() {
        not_here!("binds to write to need idmapped mounts");
    }
    // A jail's own /tmp is nosuid and goes with the run; these stay.
    for namespace in ["roots", "work"] {
        let call = dispatcher().run(namespace, "attack", &["setuid-bit", "/srv/jobs"]);
        let facts = call.ok().facts();
        assert!(facts.one("setuid-bit").starts_with("refused"), "{namespace}: {facts:?}");
    }
    let left: Vec<_> = fs::read_dir(fixture("work")).unwrap().flatten().collect();
    assert!(left.iter().all(|entry| entry.metadata().unwrap().mode() & 0o6000 == 0), "{left:?}");
}

#[test]
fn the_environment_is_the_policys_and_ours() {
    let facts = inside("environment", &["descriptors"]);
    let names: BTreeSet<_> =
        facts.all("env").iter().map(|entry| entry.split('=').next().unwrap().to_owned()).collect();
    let entries = facts.set("env");
    for expected in [
        "A=1",
        "B=two words",
        "DISPATCHER_NAMESPACE=environment",
        "DISPATCHER_SERVICE=test",
        "DISPATCHER_METHOD=main",
        "GRPC_INPUT_DATA={}",
    ] {
        assert!(entries.contains(expected), "{expected} in {entries:?}");
    }
    let known = set([
        "A",
        "B",
        "PATH",
        "HOME",
        "TMPDIR",
        "LANG",
        "DISPATCHER_NAMESPACE",
        "DISPATCHER_SERVICE",
        "DISPATCHER_METHOD",
        "DISPATCHER_INPUT_TYPE",
        "GRPC_INPUT_DATA",
    ]);
    assert!(names.iter().all(|name| known.contains(name.as_str())), "{names:?}");
}

#[test]
fn what_was_enforced_is_what_is_in_force() {
    let reply = dispatcher().call(Call::new("empty", "act"));
    let enforced: BTreeSet<&str> = reply.report.enforced.iter().map(String::as_str).collect();
    let mut expected = set([
        "ns.user",
        "ns.mount",
        "ns.pid",
        "ns.ipc",
        "ns.uts",
        "ns.net",
        "ns.cgroup",
        "root.readonly",
        "proc.restricted",
        "caps.none",
        "no_new_privs",
        "seccomp",
        "rlimits",
        "cgroup.memory",
        "cgroup.swap",
        "cgroup.pids",
        "cgroup.cpu",
        "cgroup.kill",
        "cpu_time",
        "timeout",
        "output",
    ]);
    if rootless() {
        assert!(!enforced.contains("host_uid"));
    } else {
        expected.insert("host_uid");
    }
    assert!(enforced.is_superset(&expected), "missing: {:?}", expected.difference(&enforced));
    let further: Vec<_> = enforced.difference(&expected).collect();
    assert!(
        further.iter().all(|word| word.starts_with("landlock.v") || ["memfd_noexec", "groups"].contains(word)),
        "{further:?}"
    );
    assert_eq!(reply.report.enforced.len(), enforced.len(), "each once");
    assert!(best_effort().contains("landlock"), "which is why landlock may be absent");
}

/// When memory runs out, the kernel takes a program and what it starts, and never init,
/// which must tell of it.
#[test]
fn the_program_goes_first_when_memory_runs_out_and_init_last() {
    let score = |path: &str| fs::read_to_string(path).map(|text| text.trim().to_owned());
    let own = score("/proc/self/oom_score_adj").unwrap();
    let dispatcher = Dispatcher::start([("jail", plain(""))]);
    let print = ["cat", "/proc/self/oom_score_adj"];
    assert_eq!(dispatcher.run("jail", "act", &print).ok().text().trim(), "1000");

    let name = token();
    let call = Call::new("jail", "act").args(&["name", &name, "sleep", "25000"]);
    let running = dispatcher.begin(call);
    let program = || dispatcher.descendants().into_iter().find(|process| process.name == name);
    wait_until("the program runs", Duration::from_secs(10), || program().is_some());
    let program = program().unwrap();
    let of = |pid: i32| score(&format!("/proc/{pid}/oom_score_adj"));
    assert_eq!(of(program.pid).unwrap(), "1000");
    wait_until("its init has its own score again", Duration::from_secs(10), || {
        of(program.parent).is_ok_and(|score| score == own)
    });
    assert_eq!(of(program.pid).unwrap(), "1000", "which leaves the program's as it is");
    program.signal(Signal::SIGKILL);
    running.finish().unwrap().expect(Code::Unknown, Verdict::Signalled, "signalled");
}
