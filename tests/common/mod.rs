//! What all integration tests share: programs to run, a dispatcher to run them
//! with, a client to ask it, and a look at what it leaves behind.
//!
//! Environment:
//! - `DISPATCHER_BIN`: the binary under test; by default the one cargo built.
//! - `DISPATCHER_TEST_PROGRAMS`: test programs built elsewhere; by default they
//!   are compiled with gcc into `target/test-programs`.
//! - `DISPATCHER_TEST_CGROUP_PARENT`: becomes `[server] cgroup_parent`.
//! - `DISPATCHER_TEST_TOOLS`: a directory with `grpcurl` and a Python that has grpcio.
//! - `DISPATCHER_TEST_DOCKER`: the socket of a Docker Engine of this host, or `none`
//!   where there can't be one. `scripts/test` starts one.
//! - `DISPATCHER_TEST_SLOW`: a factor for every deadline of the tests, such as 10.
//! - `CI`: a skipped test is a failed one.

// Each test file uses its own part of this.
#![allow(dead_code, unused_macros, unused_imports, missing_docs)]

pub mod client;
pub mod crowd;
pub mod dispatcher;
pub mod docker;
pub mod facts;
pub mod frames;
pub mod host;
pub mod programs;
pub mod template;

use std::{
    env,
    io::{self, Write as _},
    thread,
    time::{Duration, Instant},
};

pub use client::{Call, Reply};
pub use dispatcher::{Dispatcher, Settings, shared};
pub use facts::Facts;

/// Ends the test early, saying why; a failure where `CI` is set.
macro_rules! skip {
    ($($why:tt)*) => {{
        $crate::common::note_skip(&format!($($why)*));
        return;
    }};
}
pub(crate) use skip;

/// Ends a test that has no meaning on this kind of host or for this kind of user;
/// never a failure: another host of the suite runs it.
macro_rules! not_here {
    ($($why:tt)*) => {{
        eprintln!("not here: {}", format_args!($($why)*));
        return;
    }};
}
pub(crate) use not_here;

/// For [`skip!`].
pub fn note_skip(why: &str) {
    assert!(env::var_os("CI").is_none(), "skipped under CI: {why}");
    say_skip(why);
}

/// Past the harness, which keeps what a test prints to itself unless it fails.
pub fn say_skip(why: &str) {
    let test = thread::current().name().unwrap_or_default().to_owned();
    let _ = writeln!(io::stderr(), "skipped: {test}: {why}");
}

/// How much slower than a real machine this one may be taken to be.
pub fn slowness() -> f64 {
    env::var("DISPATCHER_TEST_SLOW")
        .ok()
        .map_or(1.0, |text| text.parse().expect("DISPATCHER_TEST_SLOW is a number such as 10"))
}

/// A deadline, scaled for slow machines.
pub fn patience(duration: Duration) -> Duration {
    duration.mul_f64(slowness())
}

/// Milliseconds, for policies and arguments, scaled for slow machines.
pub fn scaled_ms(milliseconds: u64) -> u64 {
    patience(Duration::from_millis(milliseconds)).as_millis() as u64
}

/// Polls until `probe` finds something; fails naming `what` when it does not in time.
#[track_caller]
pub fn wait_for<T>(what: &str, limit: Duration, mut probe: impl FnMut() -> Option<T>) -> T {
    let limit = patience(limit);
    let start = Instant::now();
    loop {
        if let Some(found) = probe() {
            return found;
        }
        assert!(start.elapsed() < limit, "waited {limit:?} in vain: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// [`wait_for`] with a condition.
#[track_caller]
pub fn wait_until(what: &str, limit: Duration, mut condition: impl FnMut() -> bool) {
    wait_for(what, limit, || condition().then_some(()));
}

/// Whether the tests (and so the dispatcher) run as an ordinary user.
pub fn rootless() -> bool {
    nix::unistd::geteuid().as_raw() != 0
}

/// A word that no other test, process or run of the suite uses; fits a comm (15 bytes).
pub fn token() -> String {
    use std::sync::atomic::{AtomicU32, Ordering};
    static COUNT: AtomicU32 = AtomicU32::new(0);
    format!("t{:x}-{:x}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed))
}
