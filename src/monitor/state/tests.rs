use super::{Action::*, Role::*, *};

const DRAIN: Duration = Duration::from_secs(45);

fn running() -> (State, Instant) {
    let now = Instant::now();
    let (mut state, actions) = State::start(DRAIN, false, now);
    let both =
        [Start(Launcher), Start(Server), Configure(Launcher), Configure(Server), Connect(Launcher)];
    assert_eq!(actions, both);
    assert_eq!(state.on(Event::Ready, now), [Announce]);
    assert_eq!(state.deadline(), None);
    (state, now)
}

fn gone(role: Role) -> Event {
    Event::Gone { role, clean: true }
}

fn killed(role: Role) -> Event {
    Event::Gone { role, clean: false }
}

#[test]
fn it_announces_once() {
    let (mut state, now) = running();
    assert_eq!(state.on(Event::Ready, now), []);
}

#[test]
fn a_stop_drains_then_ends() {
    let (mut state, now) = running();
    assert_eq!(state.on(Event::Stop, now), [Stopping, Drain]);
    assert_eq!(state.on(Event::Reload, now), []);
    assert_eq!(state.deadline(), Some(now + DRAIN + DRAIN_GRACE));
    assert_eq!(state.on(gone(Server), now), [End]);
    assert_eq!(state.deadline(), Some(now + END_LIMIT));
    assert_eq!(state.on(gone(Launcher), now), [Exit(0)]);
}

#[test]
fn a_second_stop_ends_at_once_and_a_third_kills() {
    let (mut state, now) = running();
    state.on(Event::Stop, now);
    assert_eq!(state.on(Event::Stop, now), [Kill(Server), End]);
    assert_eq!(state.on(Event::Stop, now), [Kill(Launcher)]);
    assert_eq!(state.on(Event::Stop, now), []);
    assert_eq!(state.on(killed(Launcher), now), []);
    assert_eq!(state.on(killed(Server), now), [Exit(1)]);
}

#[test]
fn a_server_that_does_not_drain_is_killed() {
    let (mut state, now) = running();
    state.on(Event::Stop, now);
    let late = now + DRAIN + DRAIN_GRACE;
    assert_eq!(state.on(Event::Tick, late), [Kill(Server)]);
    assert_eq!(state.on(Event::Tick, late), []);
    assert_eq!(state.deadline(), None);
    assert_eq!(state.on(killed(Server), late), [End]);
    assert_eq!(state.on(gone(Launcher), late), [Exit(0)]);
}

#[test]
fn a_launcher_that_does_not_end_is_killed_and_told_of() {
    let (mut state, now) = running();
    state.on(Event::Stop, now);
    state.on(gone(Server), now);
    let late = now + END_LIMIT;
    assert_eq!(state.on(Event::Tick, late), [Kill(Launcher)]);
    assert_eq!(state.deadline(), None);
    assert_eq!(state.on(killed(Launcher), late), [Exit(1)]);
}

#[test]
fn the_dead_are_started_again_and_joined() {
    let (mut state, now) = running();
    assert_eq!(state.on(killed(Server), now), []);
    let due = state.deadline().unwrap();
    assert_eq!(due, now + Duration::from_millis(10));
    assert_eq!(state.on(Event::Tick, due - Duration::from_millis(1)), []);
    assert_eq!(state.on(Event::Tick, due), [Start(Server), Configure(Server), Connect(Launcher)]);
    assert_eq!(state.on(killed(Launcher), due), []);
    let due = state.deadline().unwrap();
    assert_eq!(
        state.on(Event::Tick, due),
        [Start(Launcher), Configure(Launcher), Connect(Launcher)]
    );
}

#[test]
fn the_parted_are_joined_while_both_are_there() {
    let (mut state, now) = running();
    assert_eq!(state.on(Event::Parted, now), [Connect(Launcher)]);
    state.on(killed(Launcher), now);
    assert_eq!(state.on(Event::Parted, now), [], "its successor is joined anyway");
    let due = state.deadline().unwrap();
    state.on(Event::Tick, due);
    state.on(Event::Stop, due);
    assert_eq!(state.on(Event::Parted, due), [Connect(Launcher)], "what still runs needs it");
    state.on(Event::Stop, due);
    assert_eq!(state.on(Event::Parted, due), []);
}

#[test]
fn two_dead_are_joined_once_both_are_there() {
    let (mut state, now) = running();
    state.on(killed(Server), now);
    let later = now + Duration::from_millis(5);
    state.on(killed(Launcher), later);
    let first = state.deadline().unwrap();
    assert_eq!(state.on(Event::Tick, first), [Start(Server), Configure(Server)]);
    let second = state.deadline().unwrap();
    assert!(second > first);
    assert_eq!(
        state.on(Event::Tick, second),
        [Start(Launcher), Configure(Launcher), Connect(Launcher)]
    );
}

#[test]
fn starting_is_given_up_where_it_never_worked() {
    let now = Instant::now();
    let (mut state, _) = State::start(DRAIN, false, now);
    let mut at = now;
    for _ in 1..EARLY_DEATHS_MAX {
        assert_eq!(state.on(killed(Server), at), []);
        at = state.deadline().unwrap();
        assert_eq!(
            state.on(Event::Tick, at),
            [Start(Server), Configure(Server), Connect(Launcher)]
        );
    }
    assert_eq!(state.on(killed(Server), at), [End]);
    assert_eq!(state.on(gone(Launcher), at), [Exit(1)]);
}

#[test]
fn deaths_after_the_announcement_are_no_reason_to_give_up() {
    let (mut state, mut at) = running();
    for _ in 0..100 {
        state.on(killed(Server), at);
        at = state.deadline().unwrap();
        assert_eq!(
            state.on(Event::Tick, at),
            [Start(Server), Configure(Server), Connect(Launcher)]
        );
    }
}

#[test]
fn a_dead_launcher_gets_a_successor_that_cleans_up() {
    let (mut state, now) = running();
    state.on(killed(Launcher), now);
    assert_eq!(state.on(Event::Stop, now), [Stopping, Drain]);
    assert_eq!(state.on(gone(Server), now), [Start(Launcher), Configure(Launcher), End]);
    assert_eq!(state.on(gone(Launcher), now), [Exit(0)]);
}

#[test]
fn a_stop_without_a_server_ends_at_once() {
    let (mut state, now) = running();
    state.on(killed(Server), now);
    assert_eq!(state.on(Event::Stop, now), [Stopping, End]);
    assert_eq!(state.on(Event::Stop, now), []);
    assert_eq!(state.on(gone(Launcher), now), [Exit(0)]);
}

#[test]
fn a_launcher_is_replaced_while_draining() {
    let (mut state, now) = running();
    state.on(Event::Stop, now);
    state.on(killed(Launcher), now);
    let due = state.deadline().unwrap();
    assert_eq!(
        state.on(Event::Tick, due),
        [Start(Launcher), Configure(Launcher), Connect(Launcher)]
    );
}

#[test]
fn reloads_do_not_overlap() {
    let (mut state, now) = running();
    assert_eq!(state.on(Event::Reload, now), [Compile]);
    assert_eq!(state.on(Event::Reload, now), []);
    assert_eq!(state.on(Event::Reload, now), []);
    let both = state.on(Event::Compiled { containers: Some(false) }, now);
    assert_eq!(both, [SendPolicies, Reloaded, Compile]);
    assert_eq!(state.on(Event::Compiled { containers: None }, now), [Reloaded]);
}

#[test]
fn policies_that_are_ready_too_late_are_dropped() {
    let (mut state, now) = running();
    state.on(Event::Reload, now);
    state.on(Event::Stop, now);
    assert_eq!(state.on(Event::Compiled { containers: Some(false) }, now), []);
}

#[test]
fn whoever_has_dockers_socket_is_there_while_a_policy_wants_it() {
    let (mut state, now) = running();
    let wanted = |containers| Event::Compiled { containers: Some(containers) };
    state.on(Event::Reload, now);
    let actions = state.on(wanted(true), now);
    let begun = [Start(Containers), Configure(Containers), Connect(Containers)];
    assert_eq!(actions[..4], [&[SendPolicies], &begun[..]].concat());
    // It dies: the service goes on, and it comes back.
    for _ in 0..2 * EARLY_DEATHS_MAX {
        assert_eq!(state.on(killed(Containers), now), []);
        let due = state.deadline().unwrap();
        assert_eq!(state.on(Event::Tick, due), begun);
    }
    // A new server is joined to both.
    state.on(killed(Server), now);
    let due = state.deadline().unwrap();
    let joined = [Start(Server), Configure(Server), Connect(Launcher), Connect(Containers)];
    assert_eq!(state.on(Event::Tick, due), joined);
    // Nobody wants it any more.
    state.on(Event::Reload, now);
    let actions = state.on(wanted(false), now);
    assert_eq!(actions, [SendPolicies, Reloaded]);
    assert_eq!(state.on(gone(Containers), now), []);
    assert_eq!(state.deadline(), None);
}

#[test]
fn the_end_waits_for_all_containers_to_be_removed() {
    let now = Instant::now();
    let (mut state, actions) = State::start(DRAIN, true, now);
    assert_eq!(actions[5..], [Start(Containers), Configure(Containers), Connect(Containers)]);
    state.on(Event::Ready, now);
    state.on(Event::Stop, now);
    assert_eq!(state.on(gone(Server), now), [End]);
    assert_eq!(state.on(gone(Launcher), now), []);
    assert_eq!(state.deadline(), Some(now + END_LIMIT));
    assert_eq!(state.on(Event::Tick, now + END_LIMIT), [Kill(Containers)]);
    assert_eq!(state.on(killed(Containers), now), [Exit(1)]);
}
