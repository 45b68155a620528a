//! The last word on a host: each policy's jail, made for real, with a program in it.

use std::{os::fd::OwnedFd, sync::Arc, time::Duration};

use bytes::Bytes;

use super::super::launched::{Signals, with_launcher};
use crate::{
    config::LoadedConfig,
    dispatch::{CallError, Reply},
    execute::{
        Invocation, Verdict,
        launcher::Launcher,
        stop::{StopHandle, StopSignal},
    },
    host::EXITS_WITH_0,
    jail::plan::{Allowed, Limits, Mode, Template, TemplateId, TemplateSet},
    names::{Digest, RunId},
    policy::compile::Loaded,
    server::convert,
    sys,
    units::{Limit, MilliCpus},
};

/// What a jail may take to be made and a program to end that does nothing.
const PATIENCE: Duration = Duration::from_secs(10);

/// With less than this the program could take longer than [`PATIENCE`].
const CPUS_MIN: MilliCpus = MilliCpus(100);

/// Whoever starts the program is counted as well until then, and how much that is differs
/// from kernel to kernel, and with Docker's runtimes.
const MEMORY_MIN: u64 = 16 << 20;

/// A template in one of its modes.
pub(super) type Subject = (TemplateId, Mode);

/// Runs the smallest program under each of these: what went wrong, if anything.
///
/// # Errors
/// Why none could be tried.
pub(super) fn run(
    settings: &LoadedConfig,
    loaded: &Loaded,
    subjects: &[Subject],
) -> Result<Vec<Result<(), String>>, String> {
    let executable = sys::sealed_memfd(c"doctor", &[&EXITS_WITH_0], true)
        .map_err(|error| format!("no memory for a program: {error}"))?;
    let executable = Arc::new(executable);
    let policy_set = loaded.set.digest;
    with_launcher(settings, &with_room(&loaded.templates), async |executors, mut signals| {
        let mut found = Vec::new();
        for subject in subjects {
            let executor = executors.of(subject.1);
            found.push(one(executor, &mut signals, policy_set, subject, &executable).await);
        }
        found
    })
}

/// The same templates, each with enough for the trial. It shows which controls the host
/// can put in force; a policy too tight for this one program is no lack of the host's.
fn with_room(set: &TemplateSet) -> TemplateSet {
    let templates = set.templates.iter().map(|template| {
        let mut template = Template { limits: enough(&template.limits), ..template.clone() };
        // A profile may do without: C's programs end with exit_group.
        template.syscalls.allowed.insert(libc::SYS_exit as u32, Allowed::Always);
        template
    });
    TemplateSet { templates: templates.collect(), ..set.clone() }
}

/// Limits that the trial keeps within. The others suffice at their least, but for a
/// service's open files: with four of them none can be started at all, and that is told.
fn enough(limits: &Limits) -> Limits {
    Limits {
        timeout: at_least(limits.timeout, PATIENCE),
        cpu_time: at_least(limits.cpu_time, PATIENCE),
        cpus: at_least(limits.cpus, CPUS_MIN),
        memory: at_least(limits.memory, MEMORY_MIN),
        artifact_size: at_least(limits.artifact_size, EXITS_WITH_0.len() as u64),
        ..limits.clone()
    }
}

fn at_least<T: Ord>(limit: Limit<T>, needed: T) -> Limit<T> {
    match limit {
        Limit::At(limit) => Limit::At(limit.max(needed)),
        Limit::Unlimited => Limit::Unlimited,
    }
}

async fn one(
    launcher: &Launcher,
    signals: &mut Signals,
    policy_set: Digest,
    (template, mode): &Subject,
    executable: &Arc<OwnedFd>,
) -> Result<(), String> {
    let run = RunId::random().map_err(|error| format!("no run id: {error}"))?;
    let invocation = Invocation {
        run,
        policy_set,
        template: template.clone(),
        mode: *mode,
        namespace: "default".into(),
        executable: Arc::clone(executable),
        executable_size: EXITS_WITH_0.len() as u64,
        interpreter: None,
        argv: vec!["service".to_owned()],
        environment: Vec::new(),
        input: Bytes::new(),
        timeout: Limit::At(PATIENCE),
        deadline: None,
        memory: None,
        cpus: None,
        output_limit: Limit::At(0),
        stderr_limit: Limit::At(0),
    };
    let stop = StopHandle::new();
    let executed = tokio::select! {
        executed = launcher.execute(invocation, StopSignal::of(&stop), None) => executed,
        () = signals.any() => return Err("interrupted".to_owned()),
    };
    match executed {
        Ok(outcome) if outcome.verdict == Verdict::Exited && outcome.exit_code == 0 => Ok(()),
        Ok(outcome) => {
            let why = outcome.failure.map(|(_, why)| why).unwrap_or_default();
            Err(format!("the program ended as {:?} {why}", outcome.verdict))
        }
        Err(error) => {
            let reply = Reply::unknown(run, CallError::Execute(error));
            Err(convert::response(reply, "").1.message)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    #[test]
    fn a_trial_has_enough_and_all_else_is_the_policys() {
        let tight = Limits {
            timeout: Limit::At(Duration::from_millis(1)),
            cpu_time: Limit::At(Duration::from_millis(1)),
            cpus: Limit::At(MilliCpus(1)),
            memory: Limit::At(4 << 20),
            artifact_size: Limit::At(1),
            pids: Limit::At(1),
            ..Limits::default()
        };
        let template = Template { limits: tight.clone(), ..testing::template() };
        let set = TemplateSet {
            digest: Digest::of(b"set"),
            containers: false,
            templates: vec![template.clone()],
        };
        let tried = with_room(&set);
        assert_eq!(tried.digest, set.digest);
        let [tried] = &tried.templates[..] else { panic!("{tried:?}") };
        let limits = &tried.limits;
        assert!(limits.timeout.allows(PATIENCE) && limits.cpu_time.allows(PATIENCE));
        assert!(limits.cpus.allows(CPUS_MIN) && limits.memory.allows(MEMORY_MIN));
        assert!(limits.artifact_size.allows(EXITS_WITH_0.len() as u64));
        assert_eq!(tried.syscalls.allowed[&(libc::SYS_exit as u32)], Allowed::Always);
        // Nothing else is other than the policy says.
        let mut rest = tried.clone();
        rest.limits = tight;
        rest.syscalls = template.syscalls.clone();
        assert_eq!(rest, template);
    }

    #[test]
    fn limits_that_suffice_stay_as_they_are() {
        let roomy = Limits { cpus: Limit::Unlimited, ..Limits::default() };
        assert_eq!(enough(&roomy), roomy);
    }
}
