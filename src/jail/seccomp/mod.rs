//! Which system calls a run may make, and what happens to the others.
//!
//! A call meets, in this order (`rules`, the one source of the rules):
//!
//! 1. the entry it came by: i386 and x32 are deadly, whatever the call;
//! 2. the **deadly** list ([`deadly`]): ends the run, under every profile;
//! 3. **guards** that hold under every profile: `clone` may make no namespace,
//!    `clone3` does not exist (its flags are out of a filter's sight), sockets
//!    have only the families that the network mode gives, RLIMIT_CORE stays,
//!    nothing is typed into terminals, and, where asked, no executable memfd;
//! 4. the policy's **profile** ([`SyscallPolicy`](super::plan::SyscallPolicy)):
//!    what it does not allow is refused with an errno.
//!
//! [`filter::compile`] turns them into a BPF program whose "refuse" and
//! "deadly" ask the launcher (SECCOMP_RET_USER_NOTIF), so that a report can
//! name the call; [`filter::decide`] tells the launcher what to answer, by the
//! same rules. [`notify`] installs the program and speaks with the kernel.
//! [`docker::profile`] writes the same rules down for a container's runtime.

// The tables of calls, the entries that are deadly and the numbers that libc has
// are x86-64's. Built for another machine, the filter would take every call for
// one by a foreign entry, and end every run.
#[cfg(not(target_arch = "x86_64"))]
compile_error!(
    "dispatcher runs on x86-64 only: the tables of its system call filter are made for no other machine"
);

pub mod deadly;
pub mod docker;
pub mod filter;
pub mod notify;
pub mod profile;
pub mod syscalls;

mod assembler;
mod patterns;
mod rules;
mod tables;
mod tree;

#[cfg(test)]
mod docker_test;
#[cfg(test)]
mod equivalence_test;
#[cfg(test)]
pub(crate) mod interpreter;
#[cfg(test)]
mod kernel_test;
