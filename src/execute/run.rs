//! One run: from the invocation to the launcher, and back to an outcome.

use std::{
    io,
    os::fd::{AsFd as _, OwnedFd},
    pin::pin,
    time::{Duration, SystemTime},
};

use tokio::{net::unix::pipe, sync::Notify, time::Instant};

use super::{
    ExecuteError, Invocation, Outcome, OutputSink,
    capture::{Head, Tail},
    launcher::{Launcher, Registration},
    outcome::{self, Captured},
    stop::{StopSignal, until},
};
use crate::{
    jail::message::{CALL_BLOB_MAX, End, FromLauncher, FromServer, Launch, StopCause},
    sys,
};

/// How long the launcher may take to start a run, or to end one it was told to
/// end, before it is taken for stuck.
pub(super) const ANSWER_WAIT: Duration = Duration::from_secs(30);

/// How long output may still be on its way once the run is gone; only something
/// that could not be killed keeps a pipe open longer.
pub(super) const OUTPUT_WAIT: Duration = Duration::from_secs(1);

/// Inputs larger than this are copied on a thread that may block.
const BLOCKING_COPY: usize = 1 << 20;

pub(super) async fn execute(
    launcher: &Launcher,
    invocation: Invocation,
    mut stop: StopSignal,
    sink: Option<OutputSink>,
) -> Result<Outcome, ExecuteError> {
    if stop.is_stopped() {
        return Err(ExecuteError::Stopped(StopCause::Cancelled));
    }
    let plan = Plan::of(&invocation);
    let (ours, theirs) = prepare(invocation).await?;
    let mut registration = launch(launcher, &plan.launch, &theirs).await?;
    // With our copies of the write ends closed, the end of the run is the end of the pipes.
    drop(theirs);

    let mut head = Head::new(plan.output_limit);
    let mut tail = Tail::new(plan.stderr_limit);
    let over = Notify::new();
    let ended = {
        let mut output = pin!(async {
            let stdout = head.read(ours.stdout, &over, sink.as_ref());
            let stderr = tail.read(ours.stderr, sink.as_ref());
            let (stdout, stderr) = tokio::join!(stdout, stderr);
            stdout.and(stderr)
        });
        let mut output_done = false;
        let ended = {
            let watched = watch(launcher, &mut registration, &plan, &mut stop, &over);
            let mut watched = pin!(watched);
            loop {
                tokio::select! {
                    ended = &mut watched => break ended,
                    result = &mut output, if !output_done => {
                        output_done = true;
                        result.map_err(|error| internal("reading the program's output", &error))?;
                    }
                }
            }
        }?;
        if !output_done {
            drain(&mut output, ended.end.as_ref(), sink.is_some()).await?;
        }
        ended
    };
    let (stdout, stdout_truncated) = head.finish();
    let (stderr, stderr_truncated) = tail.finish();
    let captured = Captured { stdout, stdout_truncated, stderr, stderr_truncated };
    Ok(outcome::of(ended.end, captured, ended.started, plan.output_limit))
}

/// What stays known of the invocation once its parts were handed over.
pub(super) struct Plan {
    pub(super) launch: Launch,
    deadline: Option<Instant>,
    output_limit: crate::units::Limit<u64>,
    stderr_limit: crate::units::Limit<u64>,
}

impl Plan {
    pub(super) fn of(invocation: &Invocation) -> Self {
        let count = |strings: usize| u32::try_from(strings).unwrap_or(u32::MAX);
        let mut timeout = invocation.timeout;
        if let Some(deadline) = invocation.deadline {
            let left = deadline.saturating_duration_since(Instant::now());
            timeout = timeout.tightened(Some(left));
        }
        Self {
            launch: Launch {
                run: invocation.run,
                policy_set: invocation.policy_set,
                template: invocation.template.clone(),
                mode: invocation.mode,
                namespace: invocation.namespace.clone(),
                timeout: timeout.finite(),
                memory: invocation.memory,
                cpus: invocation.cpus,
                executable_size: invocation.executable_size,
                interpreter: invocation.interpreter.clone(),
                argc: count(invocation.argv.len()),
                envc: count(invocation.environment.len()),
            },
            deadline: invocation.deadline,
            output_limit: invocation.output_limit,
            stderr_limit: invocation.stderr_limit,
        }
    }
}

/// Our ends of the pipes.
pub(super) struct Ours {
    pub(super) stdout: pipe::Receiver,
    pub(super) stderr: pipe::Receiver,
}

/// What goes to the launcher, in the order of `LaunchFds`.
pub(super) struct Theirs {
    executable: std::sync::Arc<OwnedFd>,
    stdin: OwnedFd,
    stdout: OwnedFd,
    stderr: OwnedFd,
    call: OwnedFd,
}

pub(super) async fn prepare(invocation: Invocation) -> Result<(Ours, Theirs), ExecuteError> {
    let call = call_blob(&invocation)?;
    let Invocation { executable, input, .. } = invocation;
    let stdin = if input.len() > BLOCKING_COPY {
        let copy = move || sys::sealed_memfd(c"stdin", &[&input], false);
        tokio::task::spawn_blocking(copy).await.unwrap_or_else(|panic| Err(io::Error::other(panic)))
    } else {
        sys::sealed_memfd(c"stdin", &[&input], false)
    }
    .map_err(|error| internal("making standard input", &error))?;
    let call = sys::sealed_memfd(c"call", &[&call], false)
        .map_err(|error| internal("passing argv and environment", &error))?;
    let pipe = || -> io::Result<(pipe::Receiver, OwnedFd)> {
        let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
        Ok((pipe::Receiver::from_owned_fd(reader)?, writer))
    };
    let (our_stdout, stdout) = pipe().map_err(|error| internal("making a pipe", &error))?;
    let (our_stderr, stderr) = pipe().map_err(|error| internal("making a pipe", &error))?;
    let ours = Ours { stdout: our_stdout, stderr: our_stderr };
    Ok((ours, Theirs { executable, stdin, stdout, stderr, call }))
}

/// argv then environment, each string with its NUL.
fn call_blob(invocation: &Invocation) -> Result<Vec<u8>, ExecuteError> {
    let mut blob = Vec::new();
    for argument in &invocation.argv {
        blob.extend_from_slice(argument.as_bytes());
        blob.push(0);
    }
    for (name, value) in &invocation.environment {
        blob.extend_from_slice(name.as_bytes());
        blob.push(b'=');
        blob.extend_from_slice(value.as_bytes());
        blob.push(0);
    }
    let strings = invocation.argv.len() + invocation.environment.len();
    let faulty = if blob.len() > CALL_BLOB_MAX {
        Some("argv and environment are too long together")
    } else if blob.iter().filter(|byte| **byte == 0).count() != strings {
        Some("a string of argv or environment holds a NUL")
    } else {
        None
    };
    match faulty {
        Some(error) => Err(ExecuteError::Internal {
            what: "passing argv and environment",
            error: error.to_owned(),
        }),
        None => Ok(blob),
    }
}

/// Hands the run to the launcher. One that died a moment ago never saw it, so
/// its successor gets it.
pub(super) async fn launch(
    launcher: &Launcher,
    launch: &Launch,
    theirs: &Theirs,
) -> Result<Registration, ExecuteError> {
    let message = FromServer::Launch(launch.clone());
    let descriptors = [
        theirs.executable.as_fd(),
        theirs.stdin.as_fd(),
        theirs.stdout.as_fd(),
        theirs.stderr.as_fd(),
        theirs.call.as_fd(),
    ];
    for _ in 0..2 {
        let connection = launcher.connection().await?;
        let Some(mut registration) = connection.register(launch.run) else { continue };
        match connection.send(&message, &descriptors).await {
            Ok(()) => {
                registration.alive = true;
                return Ok(registration);
            }
            Err(error) if gone(&error) => launcher.forget(&connection),
            Err(error) => return Err(internal("sending the run to the launcher", &error)),
        }
    }
    Err(ExecuteError::LauncherLost)
}

fn gone(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::BrokenPipe
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::NotConnected
            | io::ErrorKind::ConnectionRefused
    )
}

/// How watching ended: with the launcher's word, or without it once the program ran.
struct Ended {
    end: Option<End>,
    started: SystemTime,
}

/// Follows the run to its end, and stops it where there is cause.
async fn watch(
    launcher: &Launcher,
    registration: &mut Registration,
    plan: &Plan,
    stop: &mut StopSignal,
    over: &Notify,
) -> Result<Ended, ExecuteError> {
    let mut started = None;
    let mut stopped = None;
    // When the launcher must have answered: by starting the run, then by ending it.
    let mut answer_by = Some(Instant::now() + ANSWER_WAIT);
    loop {
        let cause = tokio::select! {
            message = registration.next() => match message {
                None => {
                    registration.check_heard_out()?;
                    registration.alive = false;
                    let started = started.ok_or(ExecuteError::LauncherLost)?;
                    return Ok(Ended { end: None, started });
                }
                Some(FromLauncher::Refused { refusal, .. }) => {
                    registration.alive = false;
                    return Err(stopped.map_or(ExecuteError::Refused(refusal), ExecuteError::Stopped));
                }
                Some(FromLauncher::Ended { end, .. }) => {
                    registration.alive = false;
                    let started = started.unwrap_or_else(|| before(end.wall));
                    return Ok(Ended { end: Some(*end), started });
                }
                Some(FromLauncher::Started { at, .. }) => {
                    started = Some(at);
                    if stopped.is_none() {
                        answer_by = None;
                    }
                    continue;
                }
                // Not about a run, or what nobody asks of one that takes a single call.
                Some(_) => continue,
            },
            () = until(answer_by) => {
                if !launcher.give_up(registration) {
                    continue;
                }
                let owed = if started.is_some() { "end the run" } else { "start the run" };
                return Err(ExecuteError::Stuck(owed));
            }
            () = stop.stopped(), if stopped.is_none() => StopCause::Cancelled,
            () = over.notified(), if stopped.is_none() => StopCause::Output,
            () = until(plan.deadline), if stopped.is_none() => StopCause::Timeout,
        };
        stopped = Some(cause);
        answer_by = Some(Instant::now() + ANSWER_WAIT);
        registration.stop(cause).await;
    }
}

/// Reads what is still in the pipes of a run that is gone.
async fn drain(
    output: &mut (impl Future<Output = io::Result<()>> + Unpin),
    end: Option<&End>,
    live: bool,
) -> Result<(), ExecuteError> {
    let read = if live && end.is_some_and(|end| !end.quarantined) {
        // Whoever watches live takes the time he takes; the pipes do end.
        output.await
    } else {
        // What could not be killed, or outlives its launcher by a moment, is not waited for.
        tokio::time::timeout(OUTPUT_WAIT, output).await.unwrap_or(Ok(()))
    };
    read.map_err(|error| internal("reading the program's output", &error))
}

pub(super) fn before(wall: Duration) -> SystemTime {
    let now = SystemTime::now();
    now.checked_sub(wall).unwrap_or(now)
}

fn internal(what: &'static str, error: &dyn std::error::Error) -> ExecuteError {
    ExecuteError::Internal { what, error: error.to_string() }
}
