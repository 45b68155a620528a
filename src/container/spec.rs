//! A policy in Docker's words: what a container is created with.

use std::{collections::HashMap, path::Path};

use bollard::models::{
    ContainerCreateBody, HealthConfig, HostConfig, HostConfigCgroupnsModeEnum, HostConfigLogConfig,
    Mount, MountBindOptions, MountType, ResourcesUlimits,
};
use rustix::process::Resource;

use super::{
    protocol::{INIT_PATH, SERVICE_DIRECTORY},
    service, slot,
};
use crate::{
    jail::{
        blueprint::BindPiece,
        check::Checked,
        limits::resource_limits,
        plan::{
            CONTAINER_CPUS_MIN, CONTAINER_MEMORY_MIN, CONTAINER_USER, Control, Network, Template,
        },
        seccomp::{docker, filter::FilterError, syscalls},
    },
    units::Limit,
};

/// Where [`super::slot`] is shown.
pub const SLOT_TARGET: &str = "/run/dispatcher";

/// Processes of a container besides the program's: init.
const OURS: u64 = 1;

/// Of this many µs the program has its share. Docker's `NanoCpus` has the same one, but
/// more processors than the host has are an error to it, not merely no limit.
const CPU_PERIOD: i64 = 100_000;

/// More than this makes the kernel's table of descriptors itself expensive.
const OPEN_FILES_MAX: u64 = 1 << 16;

/// What nobody in a container has to see: the machine's devices, and what /proc tells of
/// the whole host. As Docker's own default, and what a jail doesn't have: /sys as a whole,
/// terminals, of which all containers together have so many, and message queues.
const MASKED: [&str; 13] = [
    "/sys",
    "/dev/mqueue",
    "/dev/pts",
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
];
const READ_ONLY: [&str; 5] =
    ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// System calls that init (`init.rs`) can't do without: the filter is on before it is.
const INIT_CALLS: [&str; 21] = [
    "clone",
    "close",
    "close_range",
    "execve",
    "exit_group",
    "getpid",
    "kill",
    "lseek",
    "mmap",
    "munmap",
    "openat",
    "pipe2",
    "ppoll",
    "prctl",
    "read",
    "rt_sigaction",
    "rt_sigprocmask",
    "setsid",
    "signalfd4",
    "wait4",
    "write",
];

/// And those that it makes a service's listening socket by.
const SERVICE_CALLS: [&str; 6] = ["accept4", "bind", "dup3", "listen", "socket", "unlinkat"];

/// What a container is made of, besides its template.
#[derive(Debug)]
pub struct Making<'a> {
    /// Its image's name.
    pub image: &'a str,
    /// Its host name.
    pub host_name: &'a str,
    /// What is the host's in its root.
    pub binds: &'a [BindPiece],
    /// The directory of its slot, on the host.
    pub slot: &'a Path,
    /// The limits that hold for its call.
    pub checked: &'a Checked,
    /// See [`super::owner`].
    pub labels: HashMap<String, String>,
    /// From [`filter`].
    pub filter: &'a str,
}

/// The policy's system calls, as Docker takes them.
///
/// # Errors
/// What can't be said in that form.
pub fn filter(template: &Template) -> Result<String, FilterError> {
    let options = crate::jail::decide::container_filter_options(template);
    docker::profile(&template.syscalls, &options)
}

/// A system call that container mode's init needs and the policy doesn't allow.
#[must_use]
pub fn lacks_for_init(template: &Template) -> Option<&'static str> {
    let service = SERVICE_CALLS.into_iter().filter(|_| template.listens);
    INIT_CALLS.into_iter().chain(service).find(|name| {
        syscalls::number(name).is_none_or(|number| !template.syscalls.allowed.contains_key(&number))
    })
}

/// What a call asks for so little of that Docker can't give it: the control, and why.
#[must_use]
pub fn too_little(checked: &Checked) -> Option<(Control, &'static str)> {
    if checked.memory.finite().is_some_and(|bytes| bytes < CONTAINER_MEMORY_MIN) {
        let why = "Docker gives no memory limit below 6MiB: ask for more memory";
        return Some((Control::CgroupMemory, why));
    }
    if checked.cpus.finite().is_some_and(|cpus| cpus < CONTAINER_CPUS_MIN) {
        let why = "a container gets no smaller share of processors than 0.01: ask for more cpus";
        return Some((Control::CgroupCpu, why));
    }
    None
}

/// The controls that a container of this policy must have.
#[must_use]
pub fn demanded(template: &Template) -> Vec<Control> {
    let mut controls = vec![
        Control::NsMount,
        Control::NsPid,
        Control::NsIpc,
        Control::NsUts,
        Control::NsCgroup,
        Control::RootReadonly,
        Control::CapsNone,
        Control::NoNewPrivs,
        Control::Seccomp,
        Control::Rlimits,
    ];
    if template.network != Network::Host {
        controls.push(Control::NsNet);
    }
    if !template.filesystem.tmp_exec {
        controls.push(Control::MemfdNoexec);
    }
    let limits = &template.limits;
    for (control, limited) in [
        (Control::CgroupMemory, limits.memory.finite().is_some()),
        (Control::CgroupSwap, limits.swap.finite().is_some()),
        (Control::CgroupPids, limits.pids.finite().is_some()),
        (Control::CgroupCpu, limits.cpus.finite().is_some()),
        // A service's is not counted.
        (Control::CpuTime, limits.cpu_time.finite().is_some() && !template.listens),
    ] {
        if limited {
            controls.push(control);
        }
    }
    controls
}

/// What to ask Docker for.
#[must_use]
pub fn body(template: &Template, making: Making<'_>) -> ContainerCreateBody {
    let mut mounts = vec![bind(making.slot, SLOT_TARGET.to_owned())];
    mounts.extend(making.binds.iter().map(|piece| {
        let path = |text: &std::ffi::CString| text.to_string_lossy().into_owned();
        bind(Path::new(&path(&piece.source)), format!("/{}", path(&piece.target)))
    }));
    // What is mounted there Docker takes in the place of its own.
    for (name, _) in slot::FOR_ETC {
        let target = format!("/etc/{name}");
        if !mounts.iter().any(|mount| mount.target.as_ref() == Some(&target)) {
            mounts.push(bind(&making.slot.join(name), target));
        }
    }
    ContainerCreateBody {
        image: Some(making.image.to_owned()),
        hostname: Some(making.host_name.to_owned()),
        // Ours in everything, whatever the image says.
        entrypoint: Some(vec![INIT_PATH.to_owned()]),
        cmd: Some(Vec::new()),
        user: Some(format!("{CONTAINER_USER}:{CONTAINER_USER}")),
        working_dir: Some("/".to_owned()),
        healthcheck: Some(HealthConfig { test: Some(vec!["NONE".to_owned()]), ..none() }),
        // Init heeds no other signal, and Docker would wait.
        stop_signal: Some("SIGKILL".to_owned()),
        attach_stdin: Some(true),
        attach_stdout: Some(true),
        attach_stderr: Some(true),
        open_stdin: Some(true),
        stdin_once: Some(true),
        tty: Some(false),
        labels: Some(making.labels),
        host_config: Some(HostConfig {
            mounts: Some(mounts),
            ..host_config(template, making.checked, making.filter)
        }),
        ..none()
    }
}

fn host_config(template: &Template, checked: &Checked, filter: &str) -> HostConfig {
    let limits = &template.limits;
    let memory = checked.memory.finite().map(signed);
    let with_swap = match (checked.memory, limits.swap) {
        (Limit::At(memory), Limit::At(swap)) => Some(signed(memory.saturating_add(swap))),
        _ => Some(-1),
    };
    HostConfig {
        memory,
        memory_swap: memory.and(with_swap),
        cpu_period: checked.cpus.finite().map(|_| CPU_PERIOD),
        cpu_quota: checked.cpus.finite().map(|cpus| i64::from(cpus.0) * CPU_PERIOD / 1000),
        pids_limit: limits.pids.finite().map(|tasks| signed(tasks.saturating_add(OURS))),
        ulimits: Some(ulimits(template)),
        network_mode: Some(network(template.network).to_owned()),
        // Its own, and no /dev/shm, which a jail doesn't have.
        ipc_mode: Some("none".to_owned()),
        cgroupns_mode: Some(HostConfigCgroupnsModeEnum::PRIVATE),
        cap_drop: Some(vec!["ALL".to_owned()]),
        security_opt: Some(vec!["no-new-privileges".to_owned(), format!("seccomp={filter}")]),
        readonly_rootfs: Some(true),
        masked_paths: Some(MASKED.map(str::to_owned).into()),
        readonly_paths: Some(READ_ONLY.map(str::to_owned).into()),
        tmpfs: Some(tmpfs(template)).filter(|all| !all.is_empty()),
        log_config: Some(HostConfigLogConfig { typ: Some("none".to_owned()), config: None }),
        // The entrypoint is one.
        init: Some(false),
        privileged: Some(false),
        auto_remove: Some(false),
        oom_kill_disable: Some(false),
        runtime: Some(template.container.runtime.clone()).filter(|name| !name.is_empty()),
        ..none()
    }
}

/// Read-only, and without what is mounted below it: that would stay writable.
fn bind(source: &Path, target: String) -> Mount {
    Mount {
        typ: Some(MountType::BIND),
        source: Some(source.to_string_lossy().into_owned()),
        target: Some(target),
        read_only: Some(true),
        bind_options: Some(MountBindOptions { non_recursive: Some(true), ..none() }),
        ..none()
    }
}

fn network(network: Network) -> &'static str {
    match network {
        // The filter takes the rest: in mode none there is no socket that lo would serve.
        Network::None | Network::Loopback => "none",
        Network::Host => "host",
    }
}

fn tmpfs(template: &Template) -> HashMap<String, String> {
    let tmp = template.filesystem.tmp.map(|size| tmp(size, template.filesystem.tmp_exec));
    let service = template.listens.then(|| {
        let (size, inodes, mode) = (service::SIZE, service::INODES, service::MODE);
        let options = format!(
            "rw,nosuid,nodev,noexec,size={size},nr_inodes={inodes},mode={mode:04o},uid={CONTAINER_USER},gid={CONTAINER_USER}"
        );
        (SERVICE_DIRECTORY.to_owned(), options)
    });
    tmp.into_iter().chain(service).collect()
}

fn tmp(size: Limit<u64>, exec: bool) -> (String, String) {
    let size = size.finite().map(|bytes| format!(",size={}", bytes.max(4096))).unwrap_or_default();
    let exec = if exec { "exec" } else { "noexec" };
    ("/tmp".to_owned(), format!("rw,nosuid,nodev,{exec},mode=1777{size}"))
}

/// RLIMIT_NOFILE where the policy has none.
fn open_files(template: &Template) -> u64 {
    template.limits.open_files.finite().unwrap_or(OPEN_FILES_MAX)
}

/// The resource limits that the program is to have.
#[must_use]
pub fn rlimits(template: &Template) -> Vec<(Resource, u64)> {
    resource_limits(&template.limits, open_files(template))
}

fn ulimits(template: &Template) -> Vec<ResourcesUlimits> {
    let ulimit = |(resource, value): (Resource, u64)| ResourcesUlimits {
        name: Some(word(resource).to_owned()),
        soft: Some(signed(value)),
        hard: Some(signed(value)),
    };
    rlimits(template).into_iter().map(ulimit).collect()
}

/// Docker's word for a resource.
fn word(resource: Resource) -> &'static str {
    match resource {
        Resource::Core => "core",
        Resource::Nofile => "nofile",
        Resource::Memlock => "memlock",
        Resource::Msgqueue => "msgqueue",
        Resource::Nice => "nice",
        Resource::Rtprio => "rtprio",
        Resource::Sigpending => "sigpending",
        Resource::Fsize => "fsize",
        // A test goes through all that there are.
        _ => "",
    }
}

/// Docker's numbers are signed.
fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

fn none<T: Default>() -> T {
    T::default()
}
