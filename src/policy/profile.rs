//! Seccomp profiles from files: `[seccomp] profile = "NAME"` is `seccomp/NAME.json`
//! in the policy directory, in the OCI form (as Docker and Podman use it) or in
//! that of the seccompiler crate.
//!
//! A profile is an allowlist. Deadly calls and clone3 in it change nothing: the
//! rules of `jail::seccomp` lie over every profile. What cannot be expressed is
//! an error, never left out in silence.

use std::collections::BTreeMap;

use crate::jail::{
    plan::{Allowed, ArgumentCondition, Network, SyscallPolicy},
    seccomp::{
        deadly,
        filter::{self, FilterOptions},
        syscalls,
    },
};

mod oci;
mod seccompiler;
#[cfg(test)]
mod tests;

/// Longest profile in bytes.
pub const PROFILE_MAX: usize = 1 << 20;

/// Most faults that are listed.
const FAULTS_MAX: usize = 50;

/// Reads a profile.
///
/// # Errors
/// All that is wrong with it, each a sentence of what and where; faults of JSON
/// come alone, with line and column.
pub fn parse(json: &str) -> Result<SyscallPolicy, Vec<String>> {
    if json.len() > PROFILE_MAX {
        return Err(vec![format!("{} bytes; a profile has at most {PROFILE_MAX}", json.len())]);
    }
    let value: serde_json::Value = serde_json::from_str(json).map_err(|e| vec![e.to_string()])?;
    let Some(top) = value.as_object() else {
        return Err(vec!["a profile is a JSON object".to_owned()]);
    };
    let mut profile = Builder::default();
    // Only the OCI form has it, and must.
    let read = if top.contains_key("defaultAction") {
        oci::read(json, &mut profile)
    } else {
        seccompiler::read(json, &mut profile)
    };
    read.map_err(|error| vec![error.to_string()])?;
    profile.finish()
}

/// A profile as it is read, with the faults so far.
#[derive(Default)]
struct Builder {
    allowed: BTreeMap<u32, Allowed>,
    errnos: BTreeMap<u32, u16>,
    default_errno: Option<u16>,
    faults: Vec<String>,
}

impl Builder {
    fn fault(&mut self, place: &str, what: impl std::fmt::Display) {
        match self.faults.len() {
            FAULTS_MAX.. => {}
            _ => self.faults.push(format!("{place}: {what}")),
        }
    }

    /// The number of a call; `None` where rules for it are without effect, or
    /// where there is no such call, which is a fault.
    fn number(&mut self, place: &str, name: &str) -> Option<u32> {
        match syscalls::number(name) {
            Some(_) if deadly::is_deadly_name(name) || name == "clone3" => None,
            Some(number) => Some(number),
            None => {
                if !syscalls::is_foreign(name) {
                    self.fault(place, format_args!("unknown system call `{name}`"));
                }
                None
            }
        }
    }

    /// Allows a call, always with `None`, else where all `conditions` are met.
    fn allow(&mut self, number: u32, conditions: Option<Vec<ArgumentCondition>>) {
        let Some(group) = conditions else {
            self.allowed.insert(number, Allowed::Always);
            return;
        };
        match self.allowed.entry(number).or_insert_with(|| Allowed::AnyOf(Vec::new())) {
            Allowed::Always => {}
            Allowed::AnyOf(groups) => groups.push(group),
        }
    }

    /// An errno as a profile says it.
    fn errno(&mut self, place: &str, errno: u32) -> Option<u16> {
        let valid = u16::try_from(errno).ok().filter(|errno| (1..=4095).contains(errno));
        if valid.is_none() {
            self.fault(place, format_args!("{errno} is no errno; they are 1 to 4095"));
        }
        valid
    }

    fn finish(mut self) -> Result<SyscallPolicy, Vec<String>> {
        if self.faults.is_empty() && self.allowed.is_empty() {
            self.faults.push("it allows no system call: no program could run".to_owned());
        }
        if !self.faults.is_empty() {
            return Err(self.faults);
        }
        // EPERM is what calls answer without being told, but for those where
        // programs expect ENOSYS.
        if let Some(errno) = self.default_errno.filter(|&errno| i32::from(errno) != libc::EPERM) {
            for (number, _) in syscalls::names() {
                self.errnos.entry(number).or_insert(errno);
            }
        }
        let policy = SyscallPolicy { allowed: self.allowed, errnos: self.errnos };
        let options = FilterOptions {
            network: Network::Host,
            refuse_exec_memfd: true,
            refuse_set_id: true,
            spare_init: false,
            exec_fd: 3,
            control_fd: 4,
            notify: true,
        };
        filter::compile(&policy, &options).map_err(|error| vec![error.to_string()])?;
        Ok(policy)
    }
}
