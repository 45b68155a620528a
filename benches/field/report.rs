//! What was found, as it goes to JSON; `page` has it for people.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::{
    alive::Alive, cold::Cold, containers::Containers, contestant::Field, idle::Idle, large::Large,
    latency::Breakdown, machine::Machine, ready::Ready, services::Services, stats::Summary,
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
    pub containers: Option<Containers>,
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
        let (notes, enforced, not_in_force, control) = Default::default();
        let (contestants, absent, breakdown, goals) = Default::default();
        let (idle, large, alive, ready, cold, services, containers) = Default::default();
        Self {
            machine,
            notes,
            enforced,
            not_in_force,
            control,
            contestants,
            absent,
            breakdown,
            idle,
            large,
            alive,
            ready,
            cold,
            services,
            containers,
            goals,
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
}
