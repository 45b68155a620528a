//! `doctor` tells what the host lacks, not what a policy is too tight for.

use std::{fs, path::Path};

use serde_json::Value;

use crate::{
    alone,
    common::{dispatcher::direct, not_here, rootless},
    file, finish, plain,
};

/// Each policy of the directory is tried and found well.
#[track_caller]
fn check_all_well(directory: &Path) {
    let (mut command, _cgroup) = alone();
    let output = finish(command.args(["doctor", "--json", "--policies"]).arg(directory));
    let told: Value = serde_json::from_slice(&output.stdout).unwrap();
    let policies = told["policies"]["policies"].as_array().unwrap();
    assert!(!policies.is_empty(), "{told:#}");
    for policy in policies {
        let found = (&policy["ok"], &policy["tried"]);
        assert_eq!(found, (&Value::from(true), &Value::from(true)), "{policy}");
    }
    assert_eq!(output.status.code(), Some(0), "{told:#}");
}

#[test]
fn tight_policies_are_no_lack_of_the_hosts() {
    let all = "timeout = \"1ms\"\ncpu_time = \"1ms\"\ncpus = 0.001\nmemory = \"4MiB\"\npids = 1\n\
               open_files = 4\nfile_size = 0\noutput = 0\nstderr = 0\nartifact_size = 1\ninput = 0\n";
    let tmp = "[filesystem]\ntmp = \"4KiB\"\n";
    let limits = format!("{tmp}[limits]\n{all}");
    let path = file("tight/all.toml", &plain(&limits));
    // It has its socket beside the three descriptors, and no time of its own.
    let service = format!("protocol = \"grpc\"\n{limits}")
        .replace("cpu_time = \"1ms\"\n", "")
        .replace("open_files = 4", "open_files = 5");
    file("tight/service.toml", &plain(&service));
    let network = "[network]\nmode = \"host\"\n";
    file("tight/direct.toml", &direct(&format!("{network}[limits]\n{all}")));
    // A program of one thread ends by exit_group.
    file("tight/calls.toml", &plain("[seccomp]\ndeny = [\"exit\"]\n"));
    let table = "[service.\"a/b\"]\nlimits = { timeout = \"5s\", artifact_size = 1 }\n";
    file("tight/table.toml", &plain(table));
    check_all_well(path.parent().unwrap());
}

/// The policies that come along, and the README's first one.
#[test]
fn the_examples_hold_here() {
    if rootless() {
        not_here!("an ordinary user's policies must name their user, and their groups");
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    check_all_well(&root.join("policies"));
    let readme = fs::read_to_string(root.join("README.md")).unwrap();
    let (_, policy) = readme.split_once("`demo.toml`:\n\n").unwrap();
    let (policy, _) = policy.split_once("\nPut it").unwrap();
    let policy = policy.replace("\n    ", "\n");
    let path = file("readme/demo.toml", policy.trim());
    check_all_well(path.parent().unwrap());
}
