//! What can only be judged of a policy as a whole: keys that contradict each
//! other, and what is allowed but surprising.

use std::path::Path;

use super::{
    Protocol,
    fault::{Fault, Place},
    resolve::Effective,
    tables::Entry,
    written::{Resolved, instances},
};
use crate::{
    jail::{
        message::LISTEN_VARIABLES,
        plan::{CONTAINER_CPUS_MIN, CONTAINER_MEMORY_MIN, Mode, Network, Root},
        root,
        seccomp::deadly,
    },
    units::{Limit, Size},
};

/// Most bytes of environment and arguments together.
pub const ENVIRONMENT_MAX: usize = 128 << 10;

/// The largest reply that clients take by default is 4 MiB, its envelope included.
const OUTPUT_COMFORTABLE: u64 = 39 * (1 << 20) / 10;

/// Everything that is wrong with a policy as a whole.
#[must_use]
pub fn faults(policy: &Effective) -> Vec<Fault> {
    let holds = &policy.resolved;
    let mut faults = Vec::new();
    modes(policy, &mut faults);
    containers(holds, &mut faults);
    services(holds, &mut faults);
    binds(holds, &mut faults);
    service_binds(policy, &mut faults);
    syscalls(holds, &mut faults);
    environment(holds, &mut faults);
    let overrides = policy.overrides.iter().map(|special| &special.resolved);
    for holds in std::iter::once(holds).chain(overrides) {
        container_limits(holds, &mut faults);
        instances(&holds.instances, &mut faults);
        service_files(holds, &mut faults);
    }
    faults
}

/// What is allowed, but may not be what was meant.
#[must_use]
pub fn warnings(policy: &Effective) -> Vec<Fault> {
    let mut warnings = Vec::new();
    interpreters_out_of_reach(&policy.resolved, &mut warnings);
    dropped_on_request(&policy.resolved, &mut warnings);
    let overrides = policy.overrides.iter().map(|special| &special.resolved);
    for holds in std::iter::once(&policy.resolved).chain(overrides) {
        large_output(holds, &mut warnings);
        allowed_in_vain(holds, &mut warnings);
        grpc(holds, &mut warnings);
    }
    warnings
}

/// Whether calls may run in `mode`.
#[must_use]
pub fn may_run_in(holds: &Resolved, mode: Mode) -> bool {
    holds.general.mode.value == mode
        || holds.general.allow_modes.value.items.iter().any(|item| item.value == mode)
}

fn modes(policy: &Effective, faults: &mut Vec<Fault>) {
    let holds = &policy.resolved;
    let general = &holds.general;
    if general.faulty.contains(&"mode") || general.faulty.contains(&"allow_modes") {
        return;
    }
    if general.mode.value == Mode::Direct {
        for entry in not_in_direct_mode(holds) {
            let place = nearest_place(policy, entry.place);
            let key = format!("{}.{}", entry.table, entry.key);
            let message = if place == entry.place {
                format!(
                    "{key} can't be honoured in direct mode (mode is set at {})",
                    general.mode.place
                )
            } else {
                format!("mode is \"direct\", which can't honour {key} (set at {})", entry.place)
            };
            faults.push(Fault::new(place, message, "leave it out, or write mode = \"jail\""));
        }
    }
    let user = &holds.identity.user;
    if !user.value.is_empty() && !may_run_in(holds, Mode::Direct) {
        let message =
            format!("identity.user is {:?}, which only direct mode can honour", user.value);
        let help = "leave it out (in a jail each run has a host uid of its own), or write mode = \"direct\"";
        faults.push(Fault::new(&user.place, message, help));
    }
}

/// What Docker can't do, or would do in another sense.
fn containers(holds: &Resolved, faults: &mut Vec<Fault>) {
    let container = &holds.container;
    if container.pull.value && container.image.value.is_empty() {
        let message = "container.pull is true, and there is no image to pull";
        faults.push(Fault::new(&container.pull.place, message, "name the image, or leave it out"));
    }
    if !may_run_in(holds, Mode::Container) {
        return;
    }
    let root = &holds.filesystem.root;
    if !container.image.value.is_empty() && root.value != Root::Empty {
        let message = "filesystem.root can't be honoured in an image, which is a root of its own";
        faults.push(Fault::new(&root.place, message, "leave one of root and image out"));
    }
    for capability in &holds.capabilities.keep.value.items {
        let message = "capabilities.keep can't be honoured in container mode: what a jail keeps \
                       holds in its own user namespace, and what Docker keeps holds on the host";
        faults.push(Fault::new(
            &capability.place,
            message,
            "leave it out, or write mode = \"jail\"",
        ));
    }
    let binds = holds.filesystem.bind.value.items.iter();
    for bind in binds.filter(|bind| !bind.value.read_only) {
        let message = "filesystem.bind can't be honoured for writing in container mode: Docker \
                       can't map the program's user to the directory's owner";
        let help = "write read_only = true, or mode = \"jail\"";
        faults.push(Fault::new(&bind.place, message, help));
    }
    for bind in &holds.filesystem.bind.value.items {
        let target = &bind.value.target;
        let (why, help) = if target == Path::new("/etc") {
            let why = "in which Docker couldn't mount its files";
            (why, "bind what is in it, such as /etc/ssl")
        } else if target.starts_with("/sys") {
            ("which is hidden", "write a target outside of /sys")
        } else {
            continue;
        };
        let message = format!(
            "filesystem.bind has the target \"{}\", {why} in container mode",
            target.display()
        );
        faults.push(Fault::new(&bind.place, message, format!("{help}, or mode = \"jail\"")));
    }
}

/// Limits that Docker can't give.
fn container_limits(holds: &Resolved, faults: &mut Vec<Fault>) {
    if !may_run_in(holds, Mode::Container) {
        return;
    }
    let (memory, swap, cpus) = (&holds.limits.memory, &holds.limits.swap, &holds.limits.cpus);
    if memory.value.finite().is_some_and(|bytes| bytes < CONTAINER_MEMORY_MIN) {
        let message = "limits.memory is less than the 6MiB that Docker gives at least";
        let help = "write \"6MiB\" or more, or mode = \"jail\"";
        faults.push(Fault::new(&memory.place, message, help));
    }
    if cpus.value.finite().is_some_and(|share| share < CONTAINER_CPUS_MIN) {
        let message = format!(
            "limits.cpus is less than the {CONTAINER_CPUS_MIN} that a container gets at least"
        );
        let help = format!("write {CONTAINER_CPUS_MIN} or more, or mode = \"jail\"");
        faults.push(Fault::new(&cpus.place, message, help));
    }
    if memory.value.finite().is_none() && swap.value.finite().is_some() {
        let message = "limits.swap can't be honoured in container mode beside unlimited memory: \
                       Docker limits both together";
        let help = "write swap = \"unlimited\" as well, limit memory, or write mode = \"jail\"";
        let place = if swap.place.is_written() { &swap.place } else { &memory.place };
        faults.push(Fault::new(place, message, help));
    }
}

/// Keys that somebody wrote and direct mode can't give.
fn not_in_direct_mode(holds: &Resolved) -> Vec<Entry<'_>> {
    let mut entries = holds.entries();
    entries.retain(|entry| entry.place.is_written() && is_ignored_in_direct_mode(entry, holds));
    entries
}

/// Whether a key means nothing in direct mode.
#[must_use]
pub fn is_ignored_in_direct_mode(entry: &Entry<'_>, holds: &Resolved) -> bool {
    match entry.table {
        "filesystem" | "seccomp" | "capabilities" => true,
        "network" => holds.network.mode.value != Network::Host,
        _ => false,
    }
}

/// What holds unless a call asks for direct mode.
fn dropped_on_request(holds: &Resolved, warnings: &mut Vec<Fault>) {
    if holds.general.mode.value == Mode::Direct || !may_run_in(holds, Mode::Direct) {
        return;
    }
    for entry in not_in_direct_mode(holds) {
        let message = format!(
            "{}.{} can't be honoured for calls that ask for direct mode, which allow_modes has",
            entry.table, entry.key
        );
        let help = "leave \"direct\" out of allow_modes, unless such calls may do without";
        warnings.push(Fault::new(entry.place, message, help));
    }
}

/// Where to show that `mode` and another key don't go together: in the policy's
/// own file if either is there.
fn nearest_place<'a>(policy: &'a Effective, key: &'a Place) -> &'a Place {
    let mode = &policy.resolved.general.mode.place;
    let own: Option<&Path> = policy.start.file();
    if key.file() != own && mode.file() == own { mode } else { key }
}

fn services(holds: &Resolved, faults: &mut Vec<Fault>) {
    let globs = &holds.services.allow.value.items;
    if globs.len() < 2 {
        return;
    }
    for glob in globs.iter().filter(|glob| glob.value.is_everything()) {
        // An inherited "*" is no mistake where it is written, but where it is inherited.
        let place = if glob.place.is_written() { &glob.place } else { &holds.services.allow.place };
        let message = format!("services.allow has {:?} beside another", glob.value.to_string());
        let help = "leave it out, or write [\"*\"] alone for every call";
        faults.push(Fault::new(place, message, help));
    }
}

fn binds(holds: &Resolved, faults: &mut Vec<Fault>) {
    let binds = &holds.filesystem.bind.value.items;
    for (index, bind) in binds.iter().enumerate() {
        let target = bind.value.target.display();
        if binds[..index].iter().any(|earlier| earlier.value.target == bind.value.target) {
            let message = format!("filesystem.bind has the target \"{target}\" twice");
            faults.push(Fault::new(&bind.place, message, "leave one of them out"));
        }
        let tmp = holds.filesystem.tmp.value.is_some();
        if tmp && bind.value.target == Path::new("/tmp") {
            let message = "filesystem.bind has the target \"/tmp\", which is the private one";
            faults.push(Fault::new(
                &bind.place,
                message,
                "write tmp = \"none\", or another target",
            ));
        }
    }
}

/// A service's own socket is in a directory that nothing may cover.
fn service_binds(policy: &Effective, faults: &mut Vec<Fault>) {
    let overrides = policy.overrides.iter().map(|special| &special.resolved);
    let mut all = std::iter::once(&policy.resolved).chain(overrides);
    if all.all(|holds| holds.call.protocol.value != Protocol::Grpc) {
        return;
    }
    let directory = root::service_directory();
    for bind in &policy.resolved.filesystem.bind.value.items {
        if bind.value.target.starts_with(directory) {
            let target = bind.value.target.display();
            let message = format!(
                "filesystem.bind has the target \"{target}\", where protocol \"grpc\" has a socket"
            );
            let help = format!("write a target outside of {}", directory.display());
            faults.push(Fault::new(&bind.place, message, help));
        }
    }
}

fn syscalls(holds: &Resolved, faults: &mut Vec<Fault>) {
    for denied in &holds.seccomp.deny.value.items {
        // A child that denies what its parent allows means it; one file that does both doesn't.
        let same_file = |place: &Place| place.file() == denied.place.file();
        let allowed = holds.seccomp.allow.value.items.iter();
        if allowed.clone().any(|at| at.value == denied.value && same_file(&at.place)) {
            let message = format!("seccomp.deny has {:?}, which allow has too", denied.value);
            faults.push(Fault::new(&denied.place, message, "leave it out of one of them"));
        }
    }
}

fn environment(holds: &Resolved, faults: &mut Vec<Fault>) {
    let set = &holds.environment.set;
    // As execve(2) counts: NAME=VALUE and a NUL.
    let size: usize = set.value.iter().map(|(name, at)| name.len() + at.value.len() + 2).sum();
    if size > ENVIRONMENT_MAX {
        let message = format!("environment.set is {size} bytes");
        let help =
            format!("keep it, and the arguments of calls, below {}", Size(ENVIRONMENT_MAX as u64));
        faults.push(Fault::new(&set.place, message, help));
    }
}

fn instances(holds: &instances::Resolved, faults: &mut Vec<Fault>) {
    if holds.faulty.is_empty() && holds.min.value > holds.max.value {
        let message = format!(
            "instances.min is {}, more than instances.max, {}",
            holds.min.value, holds.max.value
        );
        let place = if holds.min.place.is_written() { &holds.min.place } else { &holds.max.place };
        faults.push(Fault::new(place, message, "write a min that is not above max"));
    }
}

/// A service inherits a socket beside its three streams, and has one more open while it
/// becomes the program.
fn service_files(holds: &Resolved, faults: &mut Vec<Fault>) {
    const LEAST: u64 = 5;
    let files = &holds.limits.open_files;
    let few = files.value.finite().is_some_and(|files| files < LEAST);
    if few && holds.call.protocol.value == Protocol::Grpc {
        let message = "limits.open_files is too small for a gRPC service to start with";
        faults.push(Fault::new(&files.place, message, format!("write {LEAST} or more")));
    }
}

/// What means nothing to a service.
fn grpc(holds: &Resolved, warnings: &mut Vec<Fault>) {
    if holds.call.protocol.value != Protocol::Grpc {
        return;
    }
    let cpu_time = &holds.limits.cpu_time.place;
    // What comes from a policy that this one extends was meant for programs.
    let beside = cpu_time.file().is_some_and(|file| holds.call.protocol.place.file() == Some(file));
    if beside && holds.limits.cpu_time.value.finite().is_some() {
        let message = "limits.cpu_time doesn't apply with protocol \"grpc\": an instance lives on";
        warnings.push(Fault::new(cpu_time, message, "limit each call by timeout, and cpus"));
    }
    for (name, at) in &holds.environment.set.value {
        if LISTEN_VARIABLES.contains(&name.as_str()) {
            let message =
                format!("environment.set has {name}, which a service is told by its start");
            warnings.push(Fault::new(&at.place, message, "leave it out; it has no effect"));
        }
    }
    let min = &holds.instances.min;
    if min.value > 0 && holds.artifacts.digests.value.values().is_empty() {
        let message = "instances.min is for executables that the policy names, and it names none";
        warnings.push(Fault::new(&min.place, message, "list them in [artifacts] digests"));
    }
}

fn large_output(holds: &Resolved, warnings: &mut Vec<Fault>) {
    let output = &holds.limits.output;
    if !Limit::At(OUTPUT_COMFORTABLE).allows(output.value.finite().unwrap_or(u64::MAX)) {
        let message = "limits.output is above 3.9MiB, and clients take replies of 4MiB by default";
        let help = "write at most \"3.9MiB\", or make the clients' receive limit larger";
        warnings.push(Fault::new(&output.place, message, help));
    }
}

/// What lies over every profile can be written, but not allowed.
fn allowed_in_vain(holds: &Resolved, warnings: &mut Vec<Fault>) {
    for allowed in &holds.seccomp.allow.value.items {
        let why = match allowed.value.as_str() {
            name if deadly::is_deadly_name(name) => "ends the run under every profile",
            "clone3" => "always answers ENOSYS: no filter can read its flags",
            _ => continue,
        };
        let message = format!("seccomp.allow has {:?}, which {why}", allowed.value);
        warnings.push(Fault::new(&allowed.place, message, "leave it out"));
    }
}

fn interpreters_out_of_reach(holds: &Resolved, warnings: &mut Vec<Fault>) {
    if holds.filesystem.root.value != Root::Empty || !may_run_in(holds, Mode::Jail) {
        return;
    }
    for interpreter in &holds.artifacts.interpreters.value.items {
        let mut binds = holds.filesystem.bind.value.items.iter();
        if !binds.any(|bind| interpreter.value.starts_with(&bind.value.target)) {
            let message = format!(
                "artifacts.interpreters has {:?}, which an empty root doesn't have",
                interpreter.value.display()
            );
            warnings.push(Fault::new(
                &interpreter.place,
                message,
                "write [filesystem] root = \"host\"",
            ));
        }
    }
}
