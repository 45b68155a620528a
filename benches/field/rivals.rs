//! Other sandboxes, each with what comes closest to our default policy: all namespaces, a read-only
//! root with nothing but the program, a /tmp of its own, no network, no capabilities, no new
//! privileges, a filter of system calls, limits.

mod crun;
pub mod hybrid;

use std::{
    fs::{self, File},
    path::Path,
    process::{Command, Stdio},
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};

use dispatcher::jail::{
    plan::Network,
    seccomp::{
        filter::{FilterOptions, compile},
        profile::default_profile,
    },
};

use crate::{
    Outcome,
    args::Args,
    contestant::{Contestant, How, Pace},
    machine,
};

/// Another sandbox.
pub struct Rival {
    pub name: &'static str,
    /// A command that says its version.
    version: &'static [&'static str],
    /// What it has of our default policy as it is started here, and what it doesn't do.
    started: &'static str,
    leaves_out: &'static str,
    pace: Pace,
    /// Makes its files in a directory, and says how it is run.
    enter: fn(&Args, &Path) -> Outcome<How>,
}

impl Rival {
    /// It, ready to run, with its files in a directory.
    pub fn contestant(&self, args: &Args, files: &Path) -> Outcome<Contestant> {
        let Self { name, version, started, leaves_out, pace, enter } = *self;
        let how = enter(args, files)?;
        let version = machine::said(version[0].as_ref(), &version[1..])?;
        Ok(Contestant { name, version, started, leaves_out, pace, how })
    }
}

/// All of them. What they have and leave out was looked up in /proc of a program that they run.
pub const ALL: [Rival; 5] = [
    Rival {
        name: "bubblewrap",
        version: &["bwrap", "--version"],
        started: "every namespace, our own filter, an empty read-only root, a /tmp of 64 MiB",
        leaves_out: "a host user of its own (inside 65534, outside root), limits of any kind, \
                     noexec for /tmp, a restricted /proc, Landlock, why it ended",
        pace: Pace::Slow,
        enter: bubblewrap,
    },
    Rival {
        name: "crun",
        version: &["crun", "--version"],
        started: "every namespace, our own filter in OCI's words, an empty read-only root, \
                  a /tmp of 64 MiB, cgroup limits, rlimits",
        leaves_out: "host users of each run (all have the same), a wall clock, a restricted /proc, \
                     Landlock, why it ended",
        pace: Pace::Slow,
        enter: crun::enter,
    },
    Rival {
        name: "firejail",
        version: &["firejail", "--version"],
        started: "its own filter (what is forbidden, not what is allowed), rlimits; \
                  it starts a shell that starts the program",
        leaves_out: "another user than the host's root (without capabilities), namespaces of users \
                     and cgroups, an empty root, a size for /tmp, limits of all processes together, \
                     a wall clock (with its --timeout every run takes two seconds), Landlock, \
                     why it ended",
        pace: Pace::Slow,
        enter: firejail,
    },
    Rival {
        name: "hakoniwa",
        version: &["hakoniwa", "--version"],
        started: "every namespace, its own filter, Landlock, an empty read-only root, cgroup limits, \
                  rlimits, a wall clock",
        leaves_out: "a host user of its own (inside 65534, outside root), a size for /tmp, \
                     a restricted /proc, why it ended",
        pace: Pace::Slow,
        enter: hakoniwa,
    },
    Rival {
        name: "docker",
        version: &[
            "docker",
            "version",
            "--format",
            "client {{.Client.Version}}, engine {{.Server.Version}}",
        ],
        started: "its own filter, an empty read-only root, a /tmp of 64 MiB, cgroup limits, \
                  rlimits, no log",
        leaves_out: "a user namespace, host users of each run (all are 65534), a wall clock, \
                     Landlock, why it ended but \"out of memory\"",
        pace: Pace::Docker,
        enter: docker,
    },
];

/// Memory of a run as our default policy has it.
const MEMORY_BYTES: u64 = 512 << 20;
/// Size of /tmp, and of any one file.
const TMP_BYTES: u64 = 64 << 20;
/// Processes, and files of one process.
const PIDS: u64 = 256;
/// Seconds of wall clock and of processor time.
const SECONDS: u64 = 30;
/// Whom the program runs as.
const NOBODY: u32 = 65534;

/// It has no options for limits, nor one for noexec.
fn bubblewrap(args: &Args, files: &Path) -> Outcome<How> {
    let filter = files.join("filter.bpf");
    fs::write(&filter, our_filter()?)?;
    let program = args.program("ok");
    Ok(How::Spawn(Box::new(move || {
        let mut command = Command::new("bwrap");
        command.args(["--unshare-all", "--unshare-user", "--die-with-parent", "--new-session"]);
        command.args(["--uid", &NOBODY.to_string(), "--gid", &NOBODY.to_string()]);
        command.args(["--cap-drop", "ALL", "--clearenv", "--hostname", "jail"]);
        command.arg("--ro-bind").arg(&program).arg("/ok");
        command.args(["--proc", "/proc", "--dev", "/dev"]);
        command.args(["--size", &TMP_BYTES.to_string(), "--tmpfs", "/tmp"]);
        command.args(["--remount-ro", "/", "--chdir", "/", "--seccomp", "0", "--", "/ok"]);
        command.stdin(Stdio::from(File::open(&filter)?));
        Ok(command)
    })))
}

/// Our own default filter, as the kernel takes it. There is no launcher to ask, so it answers itself.
fn our_filter() -> Outcome<Vec<u8>> {
    let options = FilterOptions {
        network: Network::None,
        refuse_exec_memfd: false,
        refuse_set_id: false,
        spare_init: false,
        exec_fd: -1,
        control_fd: -1,
        notify: false,
    };
    let program = compile(&default_profile(), &options)?;
    let bytes = program.iter().flat_map(|one| {
        let [code_low, code_high] = one.code.to_ne_bytes();
        let [k0, k1, k2, k3] = one.k.to_ne_bytes();
        [code_low, code_high, one.jt, one.jf, k0, k1, k2, k3]
    });
    Ok(bytes.collect())
}

/// It can't show a root without the host's files; what it can take away is taken away. Its --timeout
/// is left out: with one it looks for the end once in two seconds, and so takes two for each run.
fn firejail(args: &Args, files: &Path) -> Outcome<How> {
    // The one place that surely isn't hidden by the other options.
    let home = files.join("home");
    fs::create_dir(&home)?;
    fs::copy(args.program("ok"), home.join("ok"))?;
    let program = Path::new(&std::env::var("HOME")?).join("ok");
    Ok(How::Spawn(Box::new(move || {
        let mut command = Command::new("firejail");
        command.args([
            "--quiet",
            "--noprofile",
            "--net=none",
            "--ipc-namespace",
            "--hostname=jail",
        ]);
        command.args(["--caps.drop=all", "--nonewprivs", "--nogroups", "--seccomp"]);
        command.arg(format!("--private={}", home.display()));
        command.args(["--private-dev", "--read-only=/", "--tmpfs=/tmp", "--noexec=/tmp"]);
        command.arg(format!("--rlimit-as={MEMORY_BYTES}"));
        command.arg(format!("--rlimit-cpu={SECONDS}"));
        command.arg(format!("--rlimit-fsize={TMP_BYTES}"));
        command.arg(format!("--rlimit-nproc={PIDS}")).arg(format!("--rlimit-nofile={PIDS}"));
        command.arg("--").arg(&program);
        Ok(command)
    })))
}

/// Its root takes the directories of another one, an empty one here; runs at once can't share it.
fn hakoniwa(args: &Args, files: &Path) -> Outcome<How> {
    let (roots, empty) = (files.join("roots"), files.join("empty"));
    fs::create_dir(&roots)?;
    fs::create_dir(&empty)?;
    let program = args.program("ok");
    let runs = AtomicU64::new(0);
    Ok(How::Spawn(Box::new(move || {
        let root = roots.join(runs.fetch_add(1, Relaxed).to_string());
        fs::create_dir(&root)?;
        let mut command = Command::new("hakoniwa");
        command.args(["run", "--unshare-all", "--hostname=jail"]);
        command.arg(format!("--rootdir={}:ro", root.display()));
        command.arg("--rootfs").arg(&empty);
        command.arg(format!("--bindmount-ro={}:/ok", program.display()));
        command.args(["--devfs=/dev", "--tmpfs=/tmp"]);
        command.arg(format!("--uidmap={NOBODY}:0:1")).arg(format!("--gidmap={NOBODY}:0:1"));
        command.args(["--landlock-restrict-all", "--landlock-fs-rx=/ok", "--landlock-fs-rw=/tmp"]);
        command.arg(format!("--cgroup-memory={MEMORY_BYTES}")).arg("--cgroup-cpus=1");
        command.arg(format!("--cgroup-memory-swap={MEMORY_BYTES}"));
        command.arg(format!("--cgroup-pids-limit={PIDS}"));
        command.arg(format!("--limit-cpu={SECONDS}")).arg(format!("--limit-walltime={SECONDS}"));
        command.arg("--limit-core=0");
        command.arg(format!("--limit-nofile={PIDS}")).arg(format!("--limit-fsize={TMP_BYTES}"));
        command.args(["--", "/ok"]);
        Ok(command)
    })))
}

fn docker(args: &Args, _files: &Path) -> Outcome<How> {
    docker_run(args)
}

/// `docker run` with the flags that come closest.
pub fn docker_run(args: &Args) -> Outcome<How> {
    let image = args.docker_image.clone().ok_or("no --docker-image")?;
    Ok(How::Spawn(Box::new(move || {
        let mut command = Command::new("docker");
        command.args(["run", "--rm", "--network=none", "--read-only", "--cap-drop=ALL"]);
        command.arg("--cgroupns=private");
        command.args(["--security-opt=no-new-privileges", "--log-driver=none"]);
        command.arg(format!("--tmpfs=/tmp:noexec,size={TMP_BYTES}"));
        command
            .arg(format!("--memory={MEMORY_BYTES}"))
            .arg(format!("--memory-swap={MEMORY_BYTES}"));
        command.arg(format!("--pids-limit={PIDS}")).arg("--cpus=1");
        command.arg(format!("--ulimit=nofile={PIDS}")).arg(format!("--ulimit=fsize={TMP_BYTES}"));
        command.arg(format!("--ulimit=cpu={SECONDS}")).arg("--ulimit=core=0");
        command.arg(format!("--user={NOBODY}:{NOBODY}"));
        command.args([image.as_str(), "/ok"]);
        Ok(command)
    })))
}
