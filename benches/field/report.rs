//! What was found: for people, and as JSON.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
};

use serde::Serialize;

use crate::{
    alive::Alive,
    cold::Cold,
    contestant::{Field, SPAWN},
    idle::Idle,
    large::Large,
    latency::Breakdown,
    machine::Machine,
    ready::Ready,
    services::Services,
    stats::Summary,
};

/// Everything.
#[derive(Debug, Serialize)]
pub struct Report {
    pub machine: Machine,
    /// What went otherwise than it should.
    pub notes: Vec<String>,
    /// What was in force in every jailed call by the default policy or one that extends it, and what
    /// of the policy's `best_effort` was not.
    pub enforced: Vec<String>,
    pub not_in_force: Vec<String>,
    /// The spawn before any server was started.
    pub control: Option<Summary>,
    pub contestants: Vec<Row>,
    /// Who could not take part, and why.
    pub absent: BTreeMap<String, String>,
    pub breakdown: Option<Breakdown>,
    pub idle: Option<Idle>,
    pub large: Option<Large>,
    pub alive: Option<Alive>,
    pub ready: Option<Ready>,
    pub cold: Option<Cold>,
    pub services: Option<Services>,
    pub goals: Vec<Goal>,
}

/// One contestant's figures.
#[derive(Debug, Default, Serialize)]
pub struct Row {
    pub name: String,
    pub version: String,
    pub started: String,
    pub leaves_out: String,
    pub latency: Option<Summary>,
    /// By number of callers: runs of the turn, and how many were answered in a second.
    pub runs: BTreeMap<usize, usize>,
    pub runs_per_s: BTreeMap<usize, f64>,
    /// Share of the processors' time in which they had nothing to do.
    pub idle_share: BTreeMap<usize, f64>,
    /// Processor time of the whole host for each run, with what was done after the turn.
    pub busy_ms_per_run: BTreeMap<usize, f64>,
    /// That which was done after the turn.
    pub busy_after_ms_per_run: BTreeMap<usize, f64>,
}

impl Row {
    /// Runs per second with so many callers, where that was measured.
    pub fn rate(&self, callers: usize) -> Option<f64> {
        self.runs_per_s.get(&callers).copied()
    }
}

/// A goal, and whether it is met.
#[derive(Debug, Serialize)]
pub struct Goal {
    pub what: String,
    pub found: f64,
    pub wanted: String,
    pub met: bool,
}

impl Goal {
    /// Met up to `limit`.
    pub fn at_most(what: &str, found: f64, limit: f64) -> Self {
        Self { what: what.into(), found, wanted: format!("≤ {limit}"), met: found <= limit }
    }

    /// Met from `limit` on.
    pub fn at_least(what: &str, found: f64, limit: f64) -> Self {
        Self { what: what.into(), found, wanted: format!("≥ {limit}"), met: found >= limit }
    }
}

impl Report {
    /// Without any figure yet.
    pub fn new(machine: Machine) -> Self {
        let (contestants, absent, breakdown, goals) = Default::default();
        let (idle, large, alive, services) = Default::default();
        let (enforced, not_in_force, notes, ready) = Default::default();
        let (control, cold) = Default::default();
        Self {
            machine,
            contestants,
            absent,
            breakdown,
            goals,
            idle,
            large,
            alive,
            services,
            enforced,
            not_in_force,
            notes,
            ready,
            control,
            cold,
        }
    }

    /// Everybody who takes part, and who doesn't.
    pub fn enter(&mut self, field: &Field) {
        for one in &field.present {
            let row = self.row(one.name);
            row.started = one.started.into();
            row.leaves_out = one.leaves_out.into();
            row.version.clone_from(&one.version);
        }
        let absent = field.absent.iter().map(|one| (one.name.to_owned(), one.why.clone()));
        self.absent.extend(absent);
    }

    /// Says and keeps what went otherwise than it should.
    pub fn note(&mut self, what: String) {
        eprintln!("field: {what}");
        self.notes.push(what);
    }

    /// A contestant's row, if it has one.
    pub fn find(&self, name: &str) -> Option<&Row> {
        self.contestants.iter().find(|row| row.name == name)
    }

    /// A contestant's row, made where there is none.
    pub fn row(&mut self, name: &str) -> &mut Row {
        let place = self.contestants.iter().position(|row| row.name == name);
        let place = place.unwrap_or_else(|| {
            self.contestants.push(Row { name: name.into(), ..Row::default() });
            self.contestants.len() - 1
        });
        &mut self.contestants[place]
    }

    /// As it is shown.
    pub fn table(&self) -> String {
        let mut text = self.machine_line();
        text.push_str(&self.contestants_table());
        for (name, why) in &self.absent {
            let _ = writeln!(text, "{name:<12} not measured: {why}");
        }
        text.push('\n');
        text.push_str(&self.sections());
        text.push_str(&self.goals_table());
        text
    }

    /// A line for each section that isn't a contest.
    fn sections(&self) -> String {
        let mut text = String::new();
        if let Some(breakdown) = &self.breakdown {
            let Breakdown { queue_ms, setup_ms, wall_ms, rest_ms, total_ms, .. } = breakdown;
            let _ = writeln!(
                text,
                "a call, medians in ms: queue {queue_ms:.3}, setup {setup_ms:.3}, \
                 program {wall_ms:.3}, the rest {rest_ms:.3}; all {total_ms:.3}"
            );
        }
        if let Some(Idle { sleepers, before, with_sleepers, after, .. }) = &self.idle {
            let [before, with, after] = [before, with_sleepers, after].map(|one| one.p50_ms);
            let _ = writeln!(
                text,
                "idle jails, p50 in ms: none {before:.3}, {sleepers} {with:.3}, none again {after:.3}"
            );
        }
        if let Some(Large { bytes, empty, same, new, resident_peak_bytes, .. }) = &self.large {
            let [empty, same, new] = [empty, same, new].map(|one| one.p50_ms);
            let [size, peak] = [*bytes as u64, *resident_peak_bytes].map(|bytes| bytes >> 20);
            let _ = writeln!(
                text,
                "{size} MiB inline, p50 in ms: empty call {empty:.1}, the same {same:.1}, \
                 new each time {new:.1}; the server's resident memory at most {peak} MiB"
            );
        }
        if let Some(alive) = &self.alive {
            let Alive { jails, kib_per_jail, seconds_to_begin, seconds_to_end } = alive;
            let _ = writeln!(
                text,
                "{jails} jails alive at once: {kib_per_jail:.0} KiB of the host each, \
                 begun in {seconds_to_begin:.1} s, gone in {seconds_to_end:.1} s"
            );
        }
        if let Some(services) = &self.services {
            let Services { straight, warm, bare_start, cold, .. } = services;
            let [straight, warm, bare, cold] =
                [straight, warm, bare_start, cold].map(|one| one.p50_ms);
            let Services { callers, straight_per_s, warm_per_s, .. } = services;
            let _ = writeln!(
                text,
                "a gRPC service, p50 in ms: straight {straight:.3}, by the dispatcher {warm:.3}; \
                 started bare {bare:.1}, by the dispatcher {cold:.1}; \
                 {callers} callers: {straight_per_s:.0} and {warm_per_s:.0} per s"
            );
        }
        text
    }

    fn machine_line(&self) -> String {
        let Machine { cpu, cores, memory_mib, kernel, cgroups, date, version, .. } = &self.machine;
        let (before, after) = (&self.machine.load_before, &self.machine.load_after);
        format!(
            "{cpu}, {cores} cores, {memory_mib} MiB, Linux {kernel}, cgroup {cgroups}\n\
             {date}, {version}, load {before} before, {after} after\n"
        )
    }

    fn contestants_table(&self) -> String {
        if self.contestants.is_empty() {
            return String::new();
        }
        let numbers: BTreeSet<usize> =
            self.contestants.iter().flat_map(|row| row.runs_per_s.keys().copied()).collect();
        let spawn =
            self.find(SPAWN).and_then(|row| row.latency.as_ref()).map(|latency| latency.p50_ms);
        let mut text = format!("\n{:<12}{:>9}{:>9}{:>9}", "", "p50 ms", "p99 ms", "× spawn");
        for callers in &numbers {
            let _ = write!(text, "{:>9}", format!("{callers}: /s"));
        }
        let most = numbers.last();
        text.push_str("   busy ms  leaves out\n");
        for row in &self.contestants {
            let latency = row.latency.as_ref();
            let times = latency.zip(spawn).map(|(latency, spawn)| latency.p50_ms / spawn);
            let _ = write!(text, "{:<12}", row.name);
            text.push_str(&cell(latency.map(|latency| latency.p50_ms), 2));
            text.push_str(&cell(latency.map(|latency| latency.p99_ms), 2));
            text.push_str(&cell(times, 1));
            for callers in &numbers {
                text.push_str(&cell(row.rate(*callers), 0));
            }
            text.push_str(&cell(most.and_then(|most| row.busy_ms_per_run.get(most)).copied(), 2));
            let _ = writeln!(text, "   {}", row.leaves_out);
        }
        text
    }

    fn goals_table(&self) -> String {
        let mut text = String::from(if self.goals.is_empty() { "" } else { "\n" });
        for goal in &self.goals {
            let met = if goal.met { "met" } else { "MISSED" };
            let Goal { what, found, wanted, .. } = goal;
            let _ = writeln!(text, "{what:<48}{found:>9.2}  {wanted:<8} {met}");
        }
        text
    }
}

fn cell(value: Option<f64>, digits: usize) -> String {
    value.map_or_else(|| format!("{:>9}", "-"), |value| format!("{value:>9.digits$}"))
}
