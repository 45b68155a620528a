//! What memory a jail takes that is built ahead of need and waits for its call.
//!
//! As many are had as the launcher keeps: two policies are called by many at once, and what it has
//! ready afterwards is counted, and goes when the policies change. Memory is looked at before they
//! are there, with them, and without them again.

use std::time::Duration;

use serde::Serialize;

use crate::{
    Outcome,
    args::Args,
    machine::memory_kib,
    processes::jails,
    report::{Goal, Report},
    rest,
    server::Server,
    sleepers::Sleepers,
};

/// Whose calls there are: the launcher keeps no more than so many of one policy.
const NAMESPACES: [&str; 2] = ["default", "ready"];
const POLICY: (&str, &str) = ("ready", "extends = \"default\"\n");

/// Calls at once of each, enough for as many as are ever kept.
const CALLS: usize = 40;

/// Looks in a row at which nothing may come or go.
const LOOKS: usize = 3;
/// How often that is tried.
const TRIES: usize = 50;
const LOOK: Duration = Duration::from_millis(200);

/// Memory of the host that goes with them, shared out.
#[derive(Debug, Serialize)]
pub struct Ready {
    pub jails: usize,
    /// All that is in use, also what the kernel could have back if the jail weren't there.
    pub kib_per_jail: f64,
    /// By how much less is available for others.
    pub kib_less_available: f64,
    /// How far the two looks without them are apart, shared out likewise.
    pub kib_uncertain: f64,
}

/// Measures, and enters what was found.
pub fn measure(args: &Args, report: &mut Report) -> Outcome {
    let mut server = Server::start(args, &[POLICY])?;
    eprintln!("field: ready, as many jails ahead as are kept");
    // What the first ones bring about, once for all, isn't any jail's share.
    fill(args, &server)?;
    server.renew()?;
    let before = Memory::look()?;
    let count = fill(args, &server)?;
    let with = Memory::look()?;
    server.renew()?;
    let after = Memory::look()?;

    let share = |kib: f64| kib / count as f64;
    let kib_per_jail = share(with.used - (before.used + after.used) / 2.0);
    let less = (before.available + after.available) / 2.0 - with.available;
    report.goals.push(Goal::at_most("KiB of one idle jail held ready", kib_per_jail, 1024.0));
    report.ready = Some(Ready {
        jails: count,
        kib_per_jail,
        kib_less_available: share(less),
        kib_uncertain: share((before.used - after.used).abs()),
    });
    server.stop()
}

/// Has the launcher build as many as it ever keeps, and counts them.
fn fill(args: &Args, server: &Server) -> Outcome<usize> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    for namespace in NAMESPACES {
        runtime.block_on(async {
            Sleepers::begin_in(namespace, args, server, CALLS).await?.end().await
        })?;
    }
    drop(runtime);
    rest::wait(server.pid())?;
    let (mut count, mut same) = (0, 0);
    for _ in 0..TRIES {
        let found = jails(server.pid())?;
        same = if found == count { same + 1 } else { 0 };
        count = found;
        if count > 0 && same == LOOKS {
            return Ok(count);
        }
        std::thread::sleep(LOOK);
    }
    Err(format!("the number of jails that wait doesn't settle: {count}").into())
}

/// The host's, in KiB.
struct Memory {
    used: f64,
    available: f64,
}

impl Memory {
    fn look() -> Outcome<Self> {
        let kib = |name| memory_kib(name).map(|kib| kib as f64);
        // What can be read again from a disk is used by nobody; shared memory can't.
        let files = kib("Buffers")? + kib("Cached")? - kib("Shmem")?;
        Ok(Self {
            used: kib("MemTotal")? - kib("MemFree")? - files,
            available: kib("MemAvailable")?,
        })
    }
}
