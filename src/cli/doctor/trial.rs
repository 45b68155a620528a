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
    jail::plan::{Mode, TemplateId},
    names::{Digest, RunId},
    policy::compile::Loaded,
    server::convert,
    sys,
    units::Limit,
};

/// What a jail may take to be made and a program to end that does nothing.
const PATIENCE: Duration = Duration::from_secs(10);

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
    with_launcher(settings, &loaded.templates, async |executors, mut signals| {
        let mut found = Vec::new();
        for subject in subjects {
            let executor = executors.of(subject.1);
            found.push(one(executor, &mut signals, policy_set, subject, &executable).await);
        }
        found
    })
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
