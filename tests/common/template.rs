//! What the processes that make runs are told of a policy, where a test is their monitor.

use dispatcher::{
    jail::{
        plan::{Filesystem, Limits, Network, Root, Template, TemplateId},
        seccomp::profile::default_profile,
    },
    units::Limit,
};

/// A policy of an empty root, a small /tmp and no network, for no mode.
pub fn template() -> Template {
    Template {
        id: TemplateId { policy: "test".into(), variant: 0 },
        modes: vec![],
        best_effort: vec![],
        limits: Limits::default(),
        filesystem: Filesystem {
            root: Root::Empty,
            tmp: Some(Limit::At(1 << 20)),
            tmp_exec: false,
            binds: vec![],
        },
        network: Network::None,
        syscalls: default_profile(),
        keep_capabilities: vec![],
        user: None,
        environment: [("PATH".into(), "/usr/bin:/bin".into())].into(),
        environment_allow: vec![],
        interpreters: vec![],
        container: Default::default(),
        listens: false,
    }
}
