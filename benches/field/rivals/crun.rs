//! crun, by an OCI bundle.

use std::{
    fs,
    path::Path,
    process::Command,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};

use dispatcher::jail::{
    plan::{Allowed, ArgumentCondition, Comparison, SyscallPolicy},
    seccomp::{profile::default_profile, syscalls},
};
use serde_json::{Value, json};

use super::{MEMORY_BYTES, NOBODY, PIDS, SECONDS, TMP_BYTES};
use crate::{Outcome, args::Args, contestant::How};

/// Host ids of its user namespace.
const FIRST_HOST_ID: u32 = 3_000_000;

/// Makes a bundle, and runs it under a new name each time.
pub fn enter(args: &Args, files: &Path) -> Outcome<How> {
    let (bundle, state) = (files.join("bundle"), files.join("crun"));
    for directory in ["ok", "proc", "dev", "tmp"] {
        fs::create_dir_all(bundle.join("rootfs").join(directory))?;
    }
    fs::remove_dir(bundle.join("rootfs/ok"))?;
    fs::copy(args.program("ok"), bundle.join("rootfs/ok"))?;
    fs::write(bundle.join("config.json"), configuration().to_string())?;
    let runs = AtomicU64::new(0);
    Ok(How::Spawn(Box::new(move || {
        let mut command = Command::new("crun");
        command.arg("--root").arg(&state).args(["--cgroup-manager=cgroupfs", "run", "--bundle"]);
        command.arg(&bundle);
        command.arg(format!("bench-{}-{}", std::process::id(), runs.fetch_add(1, Relaxed)));
        Ok(command)
    })))
}

fn configuration() -> Value {
    let ids = json!([{ "containerID": 0, "hostID": FIRST_HOST_ID, "size": 65536 }]);
    let namespaces = ["user", "mount", "pid", "ipc", "uts", "network", "cgroup"];
    let fixed = ["nosuid", "nodev", "noexec"];
    let size = format!("size={TMP_BYTES}");
    let tmp = [&fixed[..], &["mode=1777", &size]].concat();
    let rlimits = [("NOFILE", PIDS), ("FSIZE", TMP_BYTES), ("CPU", SECONDS), ("CORE", 0)].map(
        |(name, limit)| json!({ "type": format!("RLIMIT_{name}"), "hard": limit, "soft": limit }),
    );
    json!({
        "ociVersion": "1.0.0",
        "process": {
            "terminal": false,
            "user": { "uid": NOBODY, "gid": NOBODY },
            "args": ["/ok"],
            "env": [],
            "cwd": "/",
            "capabilities": {},
            "rlimits": rlimits,
            "noNewPrivileges": true,
        },
        "root": { "path": "rootfs", "readonly": true },
        "hostname": "jail",
        "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc", "options": fixed },
            { "destination": "/dev", "type": "tmpfs", "source": "tmpfs",
              "options": ["nosuid", "mode=755", "size=65536"] },
            { "destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": tmp },
        ],
        "linux": {
            "uidMappings": ids,
            "gidMappings": ids,
            "namespaces": namespaces.map(|name| json!({ "type": name })),
            "resources": {
                "devices": [{ "allow": false, "access": "rwm" }],
                "memory": { "limit": MEMORY_BYTES, "swap": MEMORY_BYTES },
                "cpu": { "quota": 100_000, "period": 100_000 },
                "pids": { "limit": PIDS },
            },
            "seccomp": seccomp(&default_profile()),
        },
    })
}

/// Our own default profile in OCI's words. A whole group of conditions is one entry.
fn seccomp(policy: &SyscallPolicy) -> Value {
    let mut rules = vec![];
    for (number, allowed) in &policy.allowed {
        let Some(name) = syscalls::name(*number) else { continue };
        let rule =
            |args: Vec<Value>| json!({ "names": [name], "action": "SCMP_ACT_ALLOW", "args": args });
        match allowed {
            Allowed::Always => rules.push(rule(vec![])),
            Allowed::AnyOf(groups) => {
                rules
                    .extend(groups.iter().map(|group| rule(group.iter().map(condition).collect())));
            }
        }
    }
    json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": rules,
    })
}

fn condition(condition: &ArgumentCondition) -> Value {
    let ArgumentCondition { index, comparison, value, .. } = condition;
    let two = |operator: &str| json!({ "index": index, "value": value, "op": operator });
    match comparison {
        Comparison::Equal => two("SCMP_CMP_EQ"),
        Comparison::NotEqual => two("SCMP_CMP_NE"),
        Comparison::Less => two("SCMP_CMP_LT"),
        Comparison::LessOrEqual => two("SCMP_CMP_LE"),
        Comparison::Greater => two("SCMP_CMP_GT"),
        Comparison::GreaterOrEqual => two("SCMP_CMP_GE"),
        Comparison::MaskedEqual { mask } => {
            json!({ "index": index, "value": mask, "valueTwo": value, "op": "SCMP_CMP_MASKED_EQ" })
        }
    }
}
