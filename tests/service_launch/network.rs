//! What the sockets that a service has of us tell it of the host.

use std::{collections::BTreeSet, fs};

use dispatcher::jail::{
    message::ServiceSocket,
    plan::{Mode, Network, Template},
};

use crate::instance::{Instance, Services, template};

fn on(network: Network) -> Services {
    Services::start_with(Template { network, ..template() })
}

/// What it sees by the socket that it inherited, and by connections to both of its sockets.
fn seen(instance: &Instance<'_>) -> [String; 4] {
    [
        instance.ask(ServiceSocket::Inherited, "interfaces 3"),
        instance.ask(ServiceSocket::Inherited, "interfaces"),
        instance.ask(ServiceSocket::Own, "interfaces"),
        // Not the first connection, which may have been made ahead.
        instance.ask(ServiceSocket::Own, "interfaces"),
    ]
}

/// A socket belongs to a network namespace, whatever its family, and shows its interfaces.
#[test]
fn its_sockets_belong_to_its_own_network() {
    for (network, expected) in [(Network::None, "lo:down"), (Network::Loopback, "lo:up")] {
        let services = on(network);
        // Built for its call, then ahead of it.
        for _ in 0..3 {
            let instance = services.instance(Mode::Jail);
            instance.has("bind");
            assert_eq!(seen(&instance), [expected; 4], "{network:?}");
            instance.stop();
        }
    }
}

#[test]
fn with_the_hosts_network_they_show_what_the_host_has() {
    let interfaces = fs::read_dir("/sys/class/net").unwrap().flatten();
    let names: BTreeSet<_> = interfaces.map(|it| it.file_name().into_string().unwrap()).collect();
    let services = on(Network::Host);
    for mode in [Mode::Jail, Mode::Direct] {
        let instance = services.instance(mode);
        instance.has("bind");
        for seen in seen(&instance) {
            let seen: BTreeSet<_> =
                seen.split(' ').map(|it| it.split(':').next().unwrap().to_owned()).collect();
            assert!(names.is_subset(&seen), "{mode}: {seen:?}");
        }
        instance.stop();
    }
}

/// SO_PEERCRED and SO_PEERPIDFD name who connected, which is us.
#[test]
fn who_connected_is_nobody_to_it() {
    let services = on(Network::None);
    let instance = services.instance(Mode::Jail);
    let told = instance.ask(ServiceSocket::Inherited, "peer");
    // No number of its namespace, and the uid of nobody.
    assert!(told.starts_with("ok pid 0 uid 65534 "), "{told}");
    // Kernels before 6.5 have no such pidfd. It is good for nothing but to see the end of us:
    // it has no number either, and no signal goes up from a pid namespace.
    let harmless = ["pidfd ENOPROTOOPT", "pidfd ok signal EINVAL number 0"];
    assert!(harmless.iter().any(|harmless| told.ends_with(harmless)), "{told}");
    instance.stop();
}
