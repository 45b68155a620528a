//! Checking what the server asks for against the template.
//!
//! The server parses what strangers send; if one of them captures it, this is
//! what stands between it and the host. Nothing here believes the server: it
//! can get what a loaded template gives, and no more.

use std::{
    collections::BTreeSet,
    os::fd::{AsFd, OwnedFd},
    time::Duration,
};

use super::{
    message::{CALL_BLOB_MAX, LISTEN_VARIABLES, Launch, LaunchFds, SCRIPT_PATH},
    plan::{Mode, Template},
};
use crate::units::{Limit, MilliCpus};

/// A launch that keeps within its template: the limits that hold for it.
#[derive(Clone, Debug, PartialEq)]
pub struct Checked {
    /// Bytes of memory.
    pub memory: Limit<u64>,
    /// Share of processor time.
    pub cpus: Limit<MilliCpus>,
    /// Wall clock.
    pub timeout: Option<Duration>,
    /// Bytes of the call memfd.
    pub call_len: u32,
}

/// Environment names that the dispatcher itself sets on every call.
const FIXED_NAMES: [&str; 5] = [
    "DISPATCHER_NAMESPACE",
    "DISPATCHER_SERVICE",
    "DISPATCHER_METHOD",
    "DISPATCHER_INPUT_TYPE",
    "GRPC_INPUT_DATA",
];

/// Checks a launch and its descriptors; `ours` are the modes that the process knows.
///
/// # Errors
/// A sentence on what was wrong; it goes to `Refusal::Invalid`.
pub fn check(
    launch: &Launch,
    fds: &LaunchFds,
    template: &Template,
    ours: &[Mode],
) -> Result<Checked, String> {
    if !ours.contains(&launch.mode) || !template.modes.contains(&launch.mode) {
        return Err(format!("mode {} is not one of the policy's", launch.mode));
    }
    let limits = &template.limits;
    match launch.timeout {
        Some(timeout) if !limits.timeout.allows(timeout) => {
            return Err("timeout is over the policy's".into());
        }
        // A service lives for many calls: each has its own time, which the server keeps.
        None if limits.timeout.finite().is_some() && !template.listens => {
            return Err("timeout is missing".into());
        }
        _ => {}
    }
    if launch.memory.is_some_and(|memory| !limits.memory.allows(memory)) {
        return Err("memory is over the policy's".into());
    }
    if launch.cpus.is_some_and(|cpus| !limits.cpus.allows(cpus)) {
        return Err("cpus is over the policy's".into());
    }
    check_executable(launch, fds, template)?;
    check_streams(fds, template)?;
    let call = read_call(fds)?;
    check_call(launch, template, &call)?;
    Ok(Checked {
        memory: limits.memory.tightened(launch.memory),
        cpus: limits.cpus.tightened(launch.cpus),
        timeout: launch.timeout,
        call_len: call.len() as u32,
    })
}

fn check_executable(launch: &Launch, fds: &LaunchFds, template: &Template) -> Result<(), String> {
    let size = sealed_size(&fds.executable).map_err(|why| format!("the executable {why}"))?;
    if size != launch.executable_size {
        return Err("the executable has another size than was said".into());
    }
    if !template.limits.artifact_size.allows(size) {
        return Err("the executable is larger than the policy allows".into());
    }
    match &launch.interpreter {
        Some(path) if !template.interpreters.contains(path) => {
            Err("the interpreter is not one of the policy's".into())
        }
        Some(_) if launch.mode == Mode::Direct => {
            Err("a script needs a jail: direct mode has no place to show it".into())
        }
        _ => Ok(()),
    }
}

/// What the program gets as 0, 1 and 2 is all of the host's that it holds: bytes
/// that nobody can change, and two pipes to write to. Anything else could be a
/// way out, such as a directory.
fn check_streams(fds: &LaunchFds, template: &Template) -> Result<(), String> {
    let size = sealed_size(&fds.stdin).map_err(|why| format!("stdin {why}"))?;
    if !template.limits.input.allows(size) {
        return Err("the input is larger than the policy allows".into());
    }
    for (name, fd) in [("stdout", &fds.stdout), ("stderr", &fds.stderr)] {
        if !is_write_end(fd).map_err(|error| format!("{name} can't be examined: {error}"))? {
            return Err(format!("{name} is not the write end of a pipe"));
        }
    }
    Ok(())
}

fn is_write_end(fd: &OwnedFd) -> rustix::io::Result<bool> {
    use rustix::fs::{FileType, OFlags, fcntl_getfl, fstat};
    let pipe = FileType::from_raw_mode(fstat(fd)?.st_mode) == FileType::Fifo;
    let access = fcntl_getfl(fd)? & (OFlags::RWMODE | OFlags::PATH);
    Ok(pipe && access == OFlags::WRONLY)
}

/// The size of a memfd that nobody can change any more.
fn sealed_size(fd: impl AsFd) -> Result<u64, String> {
    use rustix::fs::SealFlags;
    let needed = SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW;
    let seals = rustix::fs::fcntl_get_seals(&fd).map_err(|_| "is not a memfd".to_owned())?;
    if !seals.contains(needed) {
        return Err("is not sealed".into());
    }
    let stat = rustix::fs::fstat(&fd).map_err(|error| format!("can't be examined: {error}"))?;
    Ok(stat.st_size as u64)
}

/// argv and environment, as they came.
///
/// # Errors
/// A sentence on what is wrong with them.
pub fn read_call(fds: &LaunchFds) -> Result<Vec<u8>, String> {
    let size = sealed_size(&fds.call).map_err(|why| format!("the call {why}"))?;
    if size as usize > CALL_BLOB_MAX {
        return Err("argv and environment are too long".into());
    }
    let mut bytes = vec![0; size as usize];
    let mut at = 0;
    while at < bytes.len() {
        match rustix::io::pread(&fds.call, &mut bytes[at..], at as u64) {
            Ok(0) => return Err("the call is shorter than it says".into()),
            Ok(read) => at += read,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(format!("the call can't be read: {error}")),
        }
    }
    Ok(bytes)
}

fn check_call(launch: &Launch, template: &Template, call: &[u8]) -> Result<(), String> {
    let strings: Vec<&[u8]> = match call.split_last() {
        Some((0, rest)) => rest.split(|byte| *byte == 0).collect(),
        Some(_) => return Err("the call does not end with a NUL".into()),
        None => Vec::new(),
    };
    let argc = launch.argc as usize;
    if argc == 0 || argc.checked_add(launch.envc as usize) != Some(strings.len()) {
        return Err("the call has another number of strings than was said".into());
    }
    let (argv, environment) = strings.split_at(argc);
    if let Some(interpreter) = &launch.interpreter {
        // Between the two there may be the one argument of the `#!` line.
        let path = SCRIPT_PATH.as_bytes();
        let begins = argv.first() == Some(&interpreter.as_bytes())
            && argv.get(1..argv.len().min(3)).is_some_and(|next| next.contains(&path));
        if !begins {
            return Err("a script's argv must begin with its interpreter and path".into());
        }
    }
    let mut seen = BTreeSet::new();
    for entry in environment {
        let text = std::str::from_utf8(entry).map_err(|_| "an environment entry isn't UTF-8")?;
        let (name, value) = text.split_once('=').ok_or("an environment entry has no `=`")?;
        if !seen.insert(name) {
            return Err(format!("environment {name:?} is given twice"));
        }
        // Who starts it says these, and nobody else.
        if template.listens && LISTEN_VARIABLES.contains(&name) {
            return Err(format!("environment {name:?} is the launcher's to set"));
        }
        let allowed = FIXED_NAMES.contains(&name)
            || template.environment_allow.iter().any(|allowed| allowed == name)
            || template.environment.get(name).is_some_and(|set| set == value);
        if !allowed {
            return Err(format!("environment {name:?} is not allowed by the policy"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{jail::message::Launch, names::RunId, sys, testing};

    fn fds(call: &[u8]) -> LaunchFds {
        let sealed = |content: &[u8]| sys::sealed_memfd(c"sealed", &[content], false).unwrap();
        // A pipe's end is good for writing whoever reads.
        let pipe = || rustix::pipe::pipe().unwrap().1;
        LaunchFds {
            executable: sealed(b"x"),
            stdin: sealed(b""),
            stdout: pipe(),
            stderr: pipe(),
            call: sealed(call),
        }
    }

    fn checked(template: &Template, timeout: Option<u64>, entries: &[&str]) -> Result<(), String> {
        let launch = Launch {
            run: RunId::random().unwrap(),
            policy_set: crate::names::Digest::from_bytes([0; 32]),
            template: template.id.clone(),
            mode: Mode::Jail,
            namespace: "demo".into(),
            timeout: timeout.map(Duration::from_secs),
            memory: None,
            cpus: None,
            executable_size: 1,
            interpreter: None,
            argc: 1,
            envc: entries.len() as u32,
        };
        let call: Vec<u8> = std::iter::once("service")
            .chain(entries.iter().copied())
            .flat_map(|text| [text.as_bytes(), b"\0"].concat())
            .collect();
        let checked = check(&launch, &fds(&call), template, &[Mode::Jail])?;
        assert_eq!(checked.timeout, launch.timeout);
        Ok(())
    }

    #[test]
    fn a_service_may_have_no_timeout_but_none_over_the_policys() {
        let exec = testing::template();
        let service = Template { listens: true, ..exec.clone() };
        assert!(checked(&exec, None, &[]).unwrap_err().contains("missing"));
        assert_eq!(checked(&service, None, &[]), Ok(()));
        for template in [exec, service] {
            assert_eq!(checked(&template, Some(1), &[]), Ok(()));
            assert!(checked(&template, Some(3600), &[]).unwrap_err().contains("over"));
        }
    }

    #[test]
    fn what_a_service_is_told_is_not_the_servers_to_say() {
        for name in LISTEN_VARIABLES {
            let entry = format!("{name}=1");
            let mut template = testing::template();
            template.environment_allow.push(name.into());
            assert_eq!(checked(&template, Some(1), &[&entry]), Ok(()), "exec: as the policy says");
            template.listens = true;
            let refused = checked(&template, None, &[&entry]).unwrap_err();
            assert!(refused.contains(name), "{refused}");
            template.environment.insert(name.into(), "1".into());
            assert!(checked(&template, None, &[&entry]).is_err());
        }
    }
}
