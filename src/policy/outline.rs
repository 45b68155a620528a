//! What a policy leads to, step by step, in words: the plan of `explain`.

use std::{fmt::Display, time::Duration};

use super::{OutputFormat, Policy, Protocol};
use crate::{
    jail::plan::{Bind, Control, Mode, Network, Root},
    policy::{kinds::Text as _, quantities::PerSecond, values::Capability},
    units::{Limit, Size, Span},
};

/// Each step, in the order in which a call meets it.
#[must_use]
pub fn steps(policy: &Policy) -> Vec<String> {
    let mut steps = vec![admission(policy), artifact(policy)];
    let service = policy.protocol == Protocol::Grpc;
    if service {
        steps.push(instances(policy));
    }
    steps.push(cgroup(policy));
    match policy.mode {
        Mode::Direct => direct(policy, &mut steps),
        Mode::Container => container(policy, &mut steps),
        Mode::Jail => jail(policy, &mut steps),
    }
    if service {
        steps.push(listen(policy));
        steps.push(call(policy));
        return steps;
    }
    steps.push(run(policy));
    steps.push(watch(policy));
    let end = match policy.mode {
        Mode::Container => "read usage while init is the last in it, remove the container",
        _ => "see the cgroup empty, read usage from it",
    };
    steps.push(format!("when its first process ends: kill what is left, {end}"));
    steps.push(reply(policy));
    steps
}

fn admission(policy: &Policy) -> String {
    let admission = &policy.admission;
    format!(
        "admission: calls at once {}, waiting {} (for at most {}), begun per time {}",
        count(&admission.concurrency),
        count(&admission.queue),
        span(&admission.queue_timeout),
        limit(&admission.rate, PerSecond::show),
    )
}

fn artifact(policy: &Policy) -> String {
    let artifacts = &policy.artifacts;
    let mut sources = Vec::new();
    if artifacts.inline {
        sources.push("brought by the request".to_owned());
    }
    sources.push("held by its digest".to_owned());
    sources.extend(artifacts.uris.iter().map(|uri| format!("from {uri}…")));
    let mut text = format!(
        "executable: {}; at most {}",
        sources.join(", or "),
        size(&policy.limits.artifact_size)
    );
    if !artifacts.digests.is_empty() {
        text += &format!("; only {} listed digests", artifacts.digests.len());
    }
    if !artifacts.interpreters.is_empty() {
        text += &format!("; scripts for {}", artifacts.interpreters.join(", "));
    }
    text
}

fn cgroup(policy: &Policy) -> String {
    let limits = &policy.limits;
    format!(
        "cgroup of its own: memory {}, swap {}, processes and threads {}, processors {}",
        size(&limits.memory),
        size(&limits.swap),
        count(&limits.pids),
        count(&limits.cpus),
    )
}

fn jail(policy: &Policy, steps: &mut Vec<String>) {
    let network = match policy.network {
        Network::None => ", net (empty, lo is down)",
        Network::Loopback => ", net (a lo of its own, up)",
        Network::Host => "; the network is the host's",
    };
    steps.push(format!(
        "namespaces: user (a host uid of its own), mount, pid (dispatch-init is PID 1), ipc, uts, cgroup{network}"
    ));
    steps.push(format!("root: {}", root(policy)));
    steps.extend(policy.filesystem.binds.iter().map(bind));
    steps.push(
        "/dev with null, zero, full, random, urandom; /proc read-only, own processes only"
            .to_owned(),
    );
    steps.push(tmp(policy));
    steps.push(rlimits(policy));
    steps.push(format!(
        "identity: uid and gid 65534, no other groups, {}, no_new_privs",
        capabilities(policy)
    ));
    let memfds = if policy.filesystem.tmp_exec { "" } else { "; memfds can't be executed" };
    steps.push(format!("Landlock: nothing beyond that root{memfds}"));
    steps.push(format!(
        "seccomp: {} system calls allowed, the deadly ones end the run",
        policy.syscalls.allowed.len()
    ));
    steps.push(best_effort("", &policy.best_effort));
}

fn root(policy: &Policy) -> String {
    match &policy.filesystem.root {
        Root::Empty => "empty and read-only; static executables only".to_owned(),
        Root::Host => {
            "the host's /usr, /bin, /lib*, /sbin, /opt and a minimal /etc, read-only".to_owned()
        }
        Root::Directory(path) => format!("{}, read-only", path.display()),
    }
}

fn tmp(policy: &Policy) -> String {
    let exec = if policy.filesystem.tmp_exec { "executables allowed" } else { "noexec" };
    match &policy.filesystem.tmp {
        Some(tmp) => format!("/tmp: private, {}, {exec}", size(tmp)),
        None => "/tmp: none".to_owned(),
    }
}

fn container(policy: &Policy, steps: &mut Vec<String>) {
    let wanted = &policy.container;
    let runtime = match wanted.runtime.as_str() {
        "" => "Docker's default runtime".to_owned(),
        name => format!("the runtime {name}"),
    };
    let image = match (wanted.image.as_str(), wanted.pull) {
        ("", _) => format!("an image that the dispatcher imports, {}", root(policy)),
        (name, true) => format!("the image {name}, pulled where Docker lacks it"),
        (name, false) => format!("the image {name}, which Docker has to hold"),
    };
    steps.push(format!("container of its own, by {runtime}: {image}; the root is read-only"));
    let network = match policy.network {
        Network::None => "net (no sockets but AF_UNIX)",
        Network::Loopback => "net (a lo of its own, up)",
        Network::Host => "none for the network, which is the host's",
    };
    steps.push(format!(
        "namespaces: mount, pid (dispatch-init is PID 1), ipc, uts, cgroup, {network}; none for users unless Docker remaps them"
    ));
    steps.extend(policy.filesystem.binds.iter().map(bind));
    steps.push(tmp(policy));
    steps.push(rlimits(policy));
    steps.push(
        "identity: uid and gid 65534, no other groups, no capability, no_new_privs".to_owned(),
    );
    steps.push(format!(
        "seccomp: {} system calls allowed, the deadly ones end the run, unnamed",
        policy.syscalls.allowed.len()
    ));
    steps.push("confirmed by the kernel's word before the program starts".to_owned());
    steps.push(best_effort(
        " that container mode has (not ns.user, host_uid, proc.restricted, landlock)",
        &policy.best_effort,
    ));
}

fn direct(policy: &Policy, steps: &mut Vec<String>) {
    let user = policy.direct_user();
    steps.push(
        "namespaces: pid (dispatch-init is PID 1); file system and network are the host's"
            .to_owned(),
    );
    steps.push(rlimits(policy));
    steps.push(format!(
        "identity: the host's user {user}, no other groups, no capability, no_new_privs"
    ));
    steps.push(best_effort(" that direct mode has", &policy.best_effort));
}

fn bind(bind: &Bind) -> String {
    let access = if bind.read_only { "read-only" } else { "writable" };
    format!("{} shown at {}, {access}", bind.source.display(), bind.target.display())
}

fn rlimits(policy: &Policy) -> String {
    let limits = &policy.limits;
    format!(
        "resource limits: {} open files, files of {}, no core dumps",
        count(&limits.open_files),
        size(&limits.file_size)
    )
}

fn capabilities(policy: &Policy) -> String {
    if policy.keep_capabilities.is_empty() {
        return "no capability".to_owned();
    }
    let names: Vec<String> = policy.keep_capabilities.iter().map(Capability::show).collect();
    format!("within its own user namespace {}", names.join(", "))
}

/// What must be in force of the controls, or of those that this mode has.
fn best_effort(of_mode: &str, controls: &[Control]) -> String {
    let words: Vec<&str> = controls.iter().map(|control| control.word()).collect();
    let but = if words.is_empty() { "" } else { " but " };
    let words = words.join(", ");
    format!("every control{of_mode}{but}{words} must be in force, or the call is refused")
}

/// Before what an instance is made of, which comes next.
fn instances(policy: &Policy) -> String {
    let instances = &policy.instances;
    let kept = match (instances.min, policy.artifacts.digests.is_empty()) {
        (0, _) | (_, true) => String::new(),
        (min, false) => format!(", {min} of each listed executable kept"),
    };
    let gone = match instances.idle_timeout {
        Limit::At(idle) => format!("gone after {} without a call", Span(idle)),
        Limit::Unlimited => "kept without a call until others need its memory".to_owned(),
    };
    format!(
        "instance: one that is there and has room, or a new one, as follows; at most {} for each \
         executable, with {} calls each at once, {} in all; {}{kept}",
        instances.max,
        instances.concurrency,
        count(&instances.max_requests),
        gone
    )
}

fn listen(policy: &Policy) -> String {
    let within = match policy.instances.start_timeout {
        Limit::At(within) => format!(" within {}", Span(within)),
        Limit::Unlimited => ", whenever that is".to_owned(),
    };
    let names: Vec<&str> = policy.environment.keys().map(String::as_str).collect();
    format!(
        "start: it inherits a listening socket as descriptor 3, or listens at $GRPC_UNIX_SOCKET, and \
         has to answer{}; environment {}",
        within,
        [&names[..], &["DISPATCHER_NAMESPACE", "LISTEN_*"]].concat().join(", ")
    )
}

fn call(policy: &Policy) -> String {
    let limits = &policy.limits;
    format!(
        "call: the input, at most {}, to /SERVICE/METHOD; given up after {}, or {} of answer; \
         reply: the service's status and message, and of stderr what came meanwhile, the last {}",
        size(&limits.input),
        span(&limits.timeout),
        size(&limits.output),
        size(&limits.stderr)
    )
}

fn run(policy: &Policy) -> String {
    let mut names: Vec<&str> = policy.environment.keys().map(String::as_str).collect();
    names.push("DISPATCHER_*");
    names.push("GRPC_INPUT_DATA");
    let how = match policy.mode {
        Mode::Container => "by init, of a copy that it sees read-only",
        _ => "execveat of the sealed executable",
    };
    format!(
        "run: {how}; stdin is the input, at most {}; environment {}",
        size(&policy.limits.input),
        names.join(", ")
    )
}

fn watch(policy: &Policy) -> String {
    let limits = &policy.limits;
    format!(
        "watch: ended after {} of wall clock, {} of CPU time, or {} of stdout",
        span(&limits.timeout),
        span(&limits.cpu_time),
        size(&limits.output)
    )
}

fn reply(policy: &Policy) -> String {
    let output = match policy.output {
        OutputFormat::Status => "a collector.Status with stdout as its message",
        OutputFormat::Bytes => "a BytesValue of stdout",
        OutputFormat::Any => "the Any that stdout is",
    };
    format!("reply: {output}, and the last {} of stderr", size(&policy.limits.stderr))
}

fn limit<T>(limit: &Limit<T>, show: impl Fn(&T) -> String) -> String {
    match limit {
        Limit::At(value) => show(value),
        Limit::Unlimited => "unlimited".to_owned(),
    }
}

fn size(value: &Limit<u64>) -> String {
    limit(value, |bytes| Size(*bytes).to_string())
}

fn count(value: &Limit<impl Display>) -> String {
    limit(value, ToString::to_string)
}

fn span(value: &Limit<Duration>) -> String {
    limit(value, |duration| Span(*duration).to_string())
}
