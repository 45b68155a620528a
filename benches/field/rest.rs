//! Rest between those who are measured: what one leaves to be cleared up is not for the next to pay.

use std::{
    thread,
    time::{Duration, Instant},
};

use crate::{Outcome, machine::Processors, processes::descendants};

/// For so long nothing is to happen.
const LOOK: Duration = Duration::from_millis(400);
/// Share of the processors' time that they may be at work meanwhile: somebody has to look.
const BUSY_MAX: f64 = 0.05;
/// How long that is waited for.
const PATIENCE: Duration = Duration::from_secs(10);

/// Waits until the server's processes are still and the same, and the host's processors idle. False
/// where that doesn't come in time.
pub fn wait(server: u32) -> Outcome<bool> {
    let give_up = Instant::now() + PATIENCE;
    loop {
        let (before, processors) = (picture(server)?, Processors::look()?);
        thread::sleep(LOOK);
        let idle = Processors::look()?.since(processors).idle_share();
        if idle >= 1.0 - BUSY_MAX && picture(server)? == before {
            return Ok(true);
        }
        if Instant::now() > give_up {
            return Ok(false);
        }
    }
}

/// Which processes there are, and what each has used.
fn picture(server: u32) -> Outcome<Vec<(u32, u64)>> {
    let mut all: Vec<_> = descendants(server)?.iter().map(|one| (one.pid, one.ticks)).collect();
    all.sort_unstable();
    Ok(all)
}

/// An order of turns, another in each round: everybody's turn moves on, and every second round goes
/// backwards. So nobody always follows the same one.
pub fn order(round: usize, count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..count).map(|place| (place + round / 2) % count).collect();
    if round % 2 == 1 {
        order.reverse();
    }
    order
}
