use std::collections::BTreeMap;

use super::*;
use crate::jail::{
    plan::{Filesystem, HostUser, Limits, Root, TemplateId},
    seccomp::profile::default_profile,
};

fn facts(root: bool, own: u32) -> Facts {
    Facts {
        root,
        own_ids: (own, own),
        stuck_groups: vec![],
        last_capability: 40,
        landlock_abi: 7,
        memfd_noexec: None,
        open_files: 1024,
        enters_mounts: true,
        notify: true,
        processors: 2,
    }
}

fn prepared(user: Option<(u32, u32)>, best_effort: &[Control]) -> Prepared {
    let template = Template {
        id: TemplateId { policy: "test".into(), variant: 0 },
        modes: vec![Mode::Direct, Mode::Jail],
        best_effort: best_effort.to_vec(),
        limits: Limits::default(),
        filesystem: Filesystem { root: Root::Empty, tmp: None, tmp_exec: false, binds: vec![] },
        network: Network::None,
        syscalls: default_profile(),
        keep_capabilities: vec![],
        user: user.map(|(uid, gid)| HostUser { name: "somebody".into(), uid, gid }),
        environment: BTreeMap::new(),
        environment_allow: vec![],
        interpreters: vec![],
        container: Default::default(),
        listens: false,
    };
    Prepared::new(template, &facts(false, 1000)).unwrap()
}

#[test]
fn without_root_direct_mode_is_the_launchers_own_user_and_never_root() {
    let accepted = [Control::HostUid];
    for (user, best_effort, own, becomes) in [
        (Some((1000, 1000)), &[][..], 1000, Ok(1000)),
        (Some((65534, 65534)), &[], 1000, Err("host_uid")),
        (Some((65534, 65534)), &accepted, 1000, Ok(1000)),
        (Some((65534, 65534)), &accepted, 0, Err("host_uid")),
        (Some((0, 0)), &accepted, 0, Err("invalid")),
        (Some((1000, 0)), &accepted, 1000, Err("invalid")),
        (None, &accepted, 1000, Err("invalid")),
    ] {
        let prepared = prepared(user, best_effort);
        let found = match prepared.identities(Mode::Direct, None, &facts(false, own)) {
            Ok(identities) => Ok(identities.program.0),
            Err(Refusal::ControlUnavailable { control, .. }) => Err(control.word()),
            Err(_) => Err("invalid"),
        };
        assert_eq!(found, becomes, "{user:?} {best_effort:?} by {own}");
    }
}

#[test]
fn only_who_can_hand_nothing_to_others_gets_what_was_used_before() {
    use crate::jail::plan::Bind;

    type Change = fn(&mut Template);
    let changes: [(Change, bool); 6] = [
        (|_| {}, true),
        (|template| template.listens = true, false),
        (|template| template.network = Network::Loopback, true),
        (|template| template.network = Network::Host, false),
        (|template| template.filesystem.root = Root::Host, false),
        (
            |template| {
                let (source, target) = ("/srv".into(), "/srv".into());
                template.filesystem.binds.push(Bind { source, target, read_only: true });
            },
            false,
        ),
    ];
    for (change, alone) in changes {
        let mut template = prepared(None, &[]).template;
        change(&mut template);
        let prepared = Prepared::new(template, &facts(true, 0)).unwrap();
        let facts = facts(true, 0);
        assert_eq!(prepared.is_alone(Mode::Jail), alone);
        assert!(!prepared.is_alone(Mode::Direct));
        assert_eq!(prepared.takes_user_namespace(Mode::Jail, &facts), alone);
        assert_eq!(prepared.takes_empty_root(Mode::Jail, &facts).is_some(), alone);
        let network = alone && prepared.template.network == Network::None;
        assert_eq!(prepared.takes_empty_network(Mode::Jail, &facts), network);
    }
}

#[test]
fn in_a_jail_nobody_is_nobody_whoever_the_launcher_is() {
    let prepared = prepared(None, &[]);
    for own in [0, 1000] {
        let identities = prepared.identities(Mode::Jail, None, &facts(false, own)).unwrap();
        assert_eq!((identities.program, identities.init), ((65534, 65534), (65534, 65534)));
    }
    let ids = crate::jail::identity::IdPool::new((2000, 2009)).take(true).unwrap();
    let identities = prepared.identities(Mode::Jail, Some(ids), &facts(true, 0)).unwrap();
    assert_eq!((identities.program, identities.init), ((65534, 65534), (65533, 65533)));
}

#[test]
fn a_service_is_told_where_to_listen() {
    let told = |socket| {
        let Service { environment, directory, .. } = service(socket);
        let text = |string: &CString| string.to_str().unwrap().to_owned();
        (environment.iter().map(text).collect::<Vec<_>>(), directory.as_ref().map(text))
    };
    let (environment, directory) = told(None);
    let path = "GRPC_UNIX_SOCKET=/run/grpc/service.sock";
    assert_eq!(environment, ["LISTEN_FDS=1", "LISTEN_FDNAMES=grpc", path]);
    assert_eq!(directory.as_deref(), Some("/run/grpc"));
    let (environment, directory) = told(Some(c"/elsewhere/1/service.sock"));
    assert_eq!(environment[2], "GRPC_UNIX_SOCKET=/elsewhere/1/service.sock");
    assert_eq!(directory, None);
}
