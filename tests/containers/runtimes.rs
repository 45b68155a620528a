//! The runtime that a policy names, whether or not its containers can be looked into.

use std::{fs, os::unix::fs::PermissionsExt as _, path::Path};

use dispatcher::wire::status::Code;

use crate::{
    begin,
    common::{
        Call, Settings,
        dispatcher::container,
        docker::{OwnDocker, needs_docker},
        programs,
    },
    dispatcher, none_left,
};

#[test]
fn the_policys_runtime_is_used_and_named() {
    let _docker = needs_docker!();
    let docker = OwnDocker::start();
    let own = Settings::new([
        ("named", container("[container]\nruntime = \"second\"\n")),
        ("slow", container("[limits]\ncpus = 0.01\n[container]\nruntime = \"second\"\n")),
        ("default", container("")),
    ])
    .docker(&docker.docker.socket)
    .start();
    let enforced = |namespace| own.run(namespace, "act", &[]).ok().report.enforced;
    let named = enforced("named");
    assert!(named.contains(&"runtime:second".to_owned()), "{named:?}");
    // It has no kernel of its own: all is confirmed as without a name, be it slow.
    assert!(named.contains(&"caps.none".to_owned()), "{named:?}");
    let slow: Vec<_> = (0..8).map(|_| own.begin(Call::new("slow", "act"))).collect();
    for running in slow {
        assert_eq!(running.finish().unwrap().ok().report.enforced, named);
    }
    assert!(!enforced("default").iter().any(|word| word.starts_with("runtime:")));
    let (running, _) = begin(&own, "named");
    let id = docker.docker.labelled(&["dispatcher.namespace=named"]).remove(0);
    assert_eq!(docker.docker.inspect(&id)["HostConfig"]["Runtime"], "second");
    running.cancel();
    none_left(&docker.docker, &own);
}

/// Docker says that a container runs before its init does: by a little, and by much where
/// its share of a processor is small.
#[test]
fn a_slow_start_is_waited_for() {
    let _docker = needs_docker!();
    let begin = |_| dispatcher().begin(Call::new("slow", "act"));
    for running in (0..8).map(begin).collect::<Vec<_>>() {
        running.finish().unwrap().ok();
    }
}

/// A runtime that is runc, but for what the container executes: a file of this content with
/// these arguments, in the place of init. An argument of `dockerd` adds it.
fn runtime(directory: &Path, name: &str, program: &[u8], args: &[&str]) -> [String; 2] {
    let (file, script) = (directory.join(format!("{name}.program")), directory.join(name));
    fs::write(&file, program).unwrap();
    let args = [&["/in-its-place"], args].concat();
    let text = format!(
        r#"#!/bin/sh
bundle= creating= last=
for word; do
  [ "$last" != --bundle ] || bundle=$word
  [ "$word" != create ] || creating=yes
  last=$word
done
if [ "$creating" ]; then
  config=$bundle/config.json
  root=$(sed 's/.*"root":{{"path":"\([^"]*\)".*/\1/' "$config")
  case $root in /*) ;; *) root=$bundle/$root ;; esac
  cp {file:?} "$root/in-its-place" && chmod 755 "$root/in-its-place"
  sed -i 's|"args":\["/run/dispatcher/init"\]|"args":{args:?}|' "$config"
fi
PATH=$PATH:/usr/sbin:/sbin
exec runc "$@"
"#
    );
    fs::write(&script, text).unwrap();
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
    ["--add-runtime".to_owned(), format!("{name}={}", script.display())]
}

/// The words of a report's that say what was really seen of a container.
const SEEN: [&str; 11] = [
    "ns.mount",
    "ns.pid",
    "ns.ipc",
    "ns.uts",
    "ns.net",
    "ns.cgroup",
    "root.readonly",
    "caps.none",
    "no_new_privs",
    "seccomp",
    "rlimits",
];

#[test]
fn what_cannot_be_seen_is_neither_told_nor_taken_for_granted() {
    let _docker = needs_docker!();
    let directory = tempfile::tempdir().unwrap();
    let base = directory.path();
    // Init is there and does what it should, but as another file than ours, as one is that
    // has a kernel of its own. Or it is there in the end.
    let hidden = runtime(base, "hidden", dispatcher::container::INIT, &[]);
    let late = ["sleep", "1500", "exec", "/run/dispatcher/init"];
    let late = runtime(base, "late", &programs::bytes("act"), &late);
    let docker = OwnDocker::start_with(&[hidden, late].concat());
    let policy = |name: &str, accepted: &[&str]| {
        format!(
            "mode = \"container\"\nargv = \"plain\"\noutput = \"bytes\"\n\
             best_effort = {accepted:?}\n[container]\nruntime = {name:?}\n"
        )
    };
    let all = [&SEEN[..], &["memfd_noexec"]].concat();
    let but_one: Vec<_> = all.iter().copied().filter(|word| *word != "seccomp").collect();
    let own = Settings::new([
        ("hidden", policy("hidden", &["landlock"])),
        ("but-one", policy("hidden", &but_one)),
        ("accepted", policy("hidden", &all)),
        ("late", policy("late", &["landlock"])),
    ])
    .docker(&docker.docker.socket)
    .start();

    let reply = own.run("hidden", "act", &["print", "no"]);
    let reply = reply.refused(Code::FailedPrecondition, "control_unavailable");
    assert_eq!(reply.detail("control"), "ns.mount");
    for word in &all {
        assert!(reply.message.contains(&format!("{word:?}")), "{word}: {}", reply.message);
    }
    let reply = own.run("but-one", "act", &["print", "no"]);
    let reply = reply.refused(Code::FailedPrecondition, "control_unavailable");
    assert_eq!(reply.detail("control"), "seccomp");
    let reply = own.run("accepted", "act", &["print", "well"]).ok();
    assert_eq!(reply.text(), "well");
    let told = &reply.report.enforced;
    assert!(!told.iter().any(|word| all.contains(&word.as_str())), "{told:?}");
    for word in ["cgroup.memory", "cgroup.pids", "cpu_time", "runtime:hidden"] {
        assert!(told.contains(&word.to_owned()), "{word}: {told:?}");
    }
    // How soon makes no difference to what is told.
    let told = own.run("late", "act", &[]).ok().report.enforced;
    for word in SEEN {
        assert!(told.contains(&word.to_owned()), "{word}: {told:?}");
    }
    none_left(&docker.docker, &own);
}
