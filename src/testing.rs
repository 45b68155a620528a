//! What the unit tests of several modules need: a call and a policy to change.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use crate::{
    call::{AskedLimits, Call, Source},
    config::{Config, MemoryBudget, Reload},
    jail::plan::{
        Container, Filesystem, Limits, Mode, Network, Root, SyscallPolicy, Template, TemplateId,
    },
    names::Digest,
    policy::{
        Admission, Argv, Artifacts, Instances, OutputFormat, Policy, PolicyFamily, PolicySet,
        Protocol,
    },
    units::Limit,
};
use std::time::Duration;

/// Held by tests that make cgroups: all of them move the one process that they
/// are, and one's forked child would hold the locks of another for a moment.
pub(crate) fn cgroup_turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A call of `demo`'s `greeter/SayHello` that asks for nothing in particular.
pub(crate) fn call() -> Call {
    Call {
        namespace: "demo".parse().unwrap(),
        service: "greeter".parse().unwrap(),
        method: "SayHello".parse().unwrap(),
        source: Source::Registered,
        digest: None,
        input: None,
        mode: None,
        limits: AskedLimits::default(),
        args: Vec::new(),
        env: BTreeMap::new(),
        output: None,
        request_id: String::new(),
        labels: BTreeMap::new(),
        sealed: None,
        metadata: BTreeMap::new(),
        ignored_context: Vec::new(),
    }
}

/// The built-in defaults under this name.
pub(crate) fn policy(name: &str) -> Policy {
    let environment = [
        ("PATH", "/usr/local/bin:/usr/bin:/bin"),
        ("HOME", "/tmp"),
        ("TMPDIR", "/tmp"),
        ("LANG", "C.UTF-8"),
    ];
    Policy {
        id: TemplateId { policy: name.to_owned(), variant: 0 },
        digest: Digest::of(name.as_bytes()),
        mode: Mode::Jail,
        allow_modes: Vec::new(),
        best_effort: Vec::new(),
        protocol: Protocol::Exec,
        argv: Argv::Collector,
        output: OutputFormat::Status,
        limits: Limits::default(),
        filesystem: filesystem(),
        network: Network::None,
        syscalls: SyscallPolicy::default(),
        keep_capabilities: Vec::new(),
        user: String::new(),
        environment: environment.map(|(k, v)| (k.to_owned(), v.to_owned())).into(),
        environment_allow: Vec::new(),
        services: vec!["*".to_owned()],
        artifacts: Artifacts {
            inline: true,
            uris: Vec::new(),
            digests: Vec::new(),
            interpreters: Vec::new(),
        },
        admission: Admission {
            concurrency: Limit::At(16),
            queue: Limit::At(64),
            queue_timeout: Limit::At(Duration::from_secs(10)),
            rate: Limit::Unlimited,
        },
        container: Container::default(),
        instances: Instances {
            min: 0,
            max: 4,
            concurrency: 16,
            start_timeout: Limit::At(Duration::from_secs(10)),
            idle_timeout: Limit::At(Duration::from_secs(300)),
            max_requests: Limit::Unlimited,
        },
    }
}

/// A set of policies without overrides; its digest tells sets of different policies apart.
pub(crate) fn policy_set(policies: impl IntoIterator<Item = Policy>) -> PolicySet {
    let policies: BTreeMap<_, _> = policies
        .into_iter()
        .map(|base| (base.id.policy.clone(), PolicyFamily { base, overrides: Vec::new() }))
        .collect();
    PolicySet { digest: Digest::of(format!("{policies:?}").as_bytes()), policies }
}

/// The server's defaults, with nothing to listen on.
pub(crate) fn config() -> Config {
    Config {
        id: "test".to_owned(),
        listen: Vec::new(),
        health_listen: None,
        socket_mode: 0o660,
        socket_group: String::new(),
        drain_timeout: Duration::from_secs(45),
        concurrency: 0,
        memory: MemoryBudget::Bytes(8 << 30),
        inflight_bytes: 1 << 30,
        max_connections: 1024,
        cgroup_parent: String::new(),
        uid_range: (2_000_000, 2_065_535),
        policies: "/etc/dispatcher/policies".into(),
        reload: Reload::Signal,
        state: "/var/lib/dispatcher".into(),
        artifact_cache: 256 << 20,
        docker_socket: "/var/run/docker.sock".into(),
        docker_directory: "/var/cache/dispatcher".into(),
        insecure: false,
    }
}

/// A template to change, of the built-in policy's limits.
pub(crate) fn template() -> Template {
    Template {
        id: TemplateId { policy: "demo".into(), variant: 0 },
        modes: vec![Mode::Jail, Mode::Container],
        best_effort: Vec::new(),
        limits: Limits::default(),
        filesystem: filesystem(),
        network: Network::None,
        syscalls: crate::jail::seccomp::profile::default_profile(),
        keep_capabilities: Vec::new(),
        user: None,
        environment: BTreeMap::new(),
        environment_allow: Vec::new(),
        interpreters: Vec::new(),
        container: Container::default(),
        listens: false,
    }
}

/// The built-in defaults'.
fn filesystem() -> Filesystem {
    Filesystem {
        root: Root::Empty,
        tmp: Some(Limit::At(64 << 20)),
        tmp_exec: false,
        binds: Vec::new(),
    }
}
