//! PID 1 of containers, in a pid namespace without Docker around it: what the program is
//! given, what is told of its end, and that nobody else can tell it.

mod common;
#[path = "container_init/contained.rs"]
mod contained;

use std::{
    fs,
    io::{self, Write as _},
    process::{Command, Stdio},
};

use common::{host, host::Process, programs, rootless, skip, token, wait_for, wait_until};
use contained::{
    Container, Hold, LIMIT, NONCE, Stream, command, directory, executable, exited, impossible,
    killed, message, message_of, record_at_end, script,
};
use dispatcher::container::{
    INIT,
    protocol::{
        ARGUMENTS_MAX, ENVIRONMENT_MAX, Header, INIT_PATH, Record, STRINGS_MAX, Verdict, exit,
    },
};
use nix::{libc, sys::signal::Signal};
use proptest::{prelude::*, test_runner::TestRunner};

macro_rules! needs_namespaces {
    () => {
        if let Some(why) = impossible() {
            skip!("no namespaces: {why}");
        }
    };
}

// After what it uses: a macro's scope is that of the text.
#[path = "container_init/listener.rs"]
mod listener;

#[test]
fn it_is_small_and_static() {
    assert!(INIT.len() < 8192, "{} bytes", INIT.len());
    assert_eq!(INIT[..4], *b"\x7fELF");
    let word = |at: usize| u16::from_le_bytes(INIT[at..at + 2].try_into().unwrap());
    // ET_EXEC: at a fixed address, with nothing to relocate.
    assert_eq!(word(16), 2);
    // e_phoff is 64 and e_phentsize 56 in every ELF of 64 bits that a linker makes.
    for segment in (0..usize::from(word(56))).map(|index| 64 + index * 56) {
        let (kind, flags) = (word(segment), word(segment + 4));
        // Neither PT_DYNAMIC nor PT_INTERP; nothing both writable and executable.
        assert!(![2, 3].contains(&kind) && flags & 3 != 3, "segment at {segment}");
    }
}

#[test]
fn the_program_gets_what_was_sent() {
    needs_namespaces!();
    let argv: [&[u8]; 6] = [b"any name", b"%s\\0", b"", b"a b\n", b"\xff\x01", b"-"];
    let run = Container::start().run(&message("/usr/bin/printf", &argv, &[]), b"");
    assert_eq!((run.stdout.as_slice(), run.record), (&b"\0a b\n\0\xff\x01\0-\0"[..], exited(0)));

    let environment: [&[u8]; 4] = [b"B=2", b"A=\xfe = \n", b"EMPTY=", b"B=2 again"];
    let run = Container::start().run(&message("/usr/bin/env", &[b"env", b"-0"], &environment), b"");
    assert_eq!(run.stdout, b"B=2\0A=\xfe = \n\0EMPTY=\0B=2 again\0");

    let argv: [&[u8]; 2] = [b"\x80 cat", b"/proc/self/cmdline"];
    let run = Container::start().run(&message("/bin/cat", &argv, &[]), b"");
    assert_eq!(run.stdout, b"\x80 cat\0/proc/self/cmdline\0");

    // More than a pipe holds.
    let input: Vec<u8> = (0..300_000_u32).map(|index| (index % 251) as u8).collect();
    let run = Container::start().run(&message("/bin/cat", &[b"cat"], &[]), &input);
    assert!(run.stdout == input && run.record == exited(0));
}

#[test]
fn any_strings_arrive() {
    needs_namespaces!();
    let word = prop::collection::vec(1_u8.., 0..40);
    let words = prop::collection::vec(word, 0..12);
    let input = prop::collection::vec(any::<u8>(), 0..200);
    let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(12) };
    TestRunner::new(config)
        .run(&(words, input), |(words, input)| {
            let text = br#"for word; do printf '%s\0' "$word"; done; exec cat"#;
            let fixed: [&[u8]; 4] = [b"sh", b"-c", text, b"sh"];
            let argv: Vec<&[u8]> =
                fixed.into_iter().chain(words.iter().map(Vec::as_slice)).collect();
            let message = message("/bin/sh", &argv, &[b"PATH=/usr/bin:/bin"]);
            let run = Container::start().run(&message, &input);
            let mut expected: Vec<u8> =
                words.iter().flat_map(|w| [w.as_slice(), b"\0"].concat()).collect();
            expected.extend(input);
            prop_assert_eq!(run.stdout, expected);
            Ok(())
        })
        .unwrap();
}

#[test]
fn long_argument_lists_arrive() {
    needs_namespaces!();
    // Near all of what a message may hold; the kernel wants more for the pointers.
    let word = [b'w'; 1000];
    let count = STRINGS_MAX as usize / (word.len() + 1) - 1;
    let mut argv: Vec<&[u8]> = vec![b"sh", b"-c", b"echo $#", b"sh"];
    argv.resize(count, &word);
    let run = Container::start().run(&message("/bin/sh", &argv, &[]), b"");
    assert_eq!(String::from_utf8_lossy(&run.stdout), format!("{}\n", count - 4));
}

#[test]
fn ends_are_told_apart() {
    needs_namespaces!();
    for code in [0, 1, 137, 255] {
        let run = Container::start().run(&script(&format!("exit {code}")), b"");
        assert_eq!(run.record, exited(code));
    }
    for signal in [libc::SIGKILL, libc::SIGSEGV, libc::SIGTERM] {
        let run = Container::start().run(&script(&format!("kill -{signal} $$; sleep 100")), b"");
        // With or without a core.
        let Verdict::Ended(status) = run.record.verdict else { panic!("{run:?}") };
        assert_eq!(
            Record { verdict: Verdict::Ended(status & !0x80), ..run.record },
            killed(signal)
        );
    }
}

#[test]
fn deaths_by_sigsys_are_told() {
    needs_namespaces!();
    let run = Container::start().run(&script("kill -SYS $$"), b"");
    assert!(run.record.denied && !run.record.left_behind, "{run:?}");

    // Somebody else's, who has nobody but init to reap it; and is gone when reaped.
    let orphan = "pid=$( (sh -c 'echo $$; exec >/dev/null; kill -SYS $$' &) )
        while kill -0 $pid 2>/dev/null; do :; done; exit 3";
    let run = Container::start().run(&script(orphan), b"");
    assert_eq!(run.record, Record { denied: true, ..exited(3) });
}

#[test]
fn what_cannot_be_executed_is_told_by_errno() {
    needs_namespaces!();
    for (path, errno) in [
        ("/nonexistent", libc::ENOENT),
        ("", libc::ENOENT),
        ("/etc/passwd", libc::EACCES),
        ("/", libc::EACCES),
        ("/etc/passwd/below", libc::ENOTDIR),
        ("/run/dispatcher/text", libc::ENOEXEC),
    ] {
        let container = Container::start();
        executable(&container.directory.path().join("text"), b"words\n");
        let run = container.run(&message(path, &[b"x"], &[]), b"input");
        let verdict = Verdict::NotStarted(errno as u32);
        assert_eq!(run.record, Record { verdict, denied: false, left_behind: false }, "{path:?}");
        assert!(run.stdout.is_empty() && run.stderr.is_empty());
    }
    // One argument of more than the kernel takes.
    let long = vec![b'w'; 200_000];
    let run = Container::start().run(&message("/bin/true", &[b"true", &long], &[]), b"");
    assert_eq!(run.record.verdict, Verdict::NotStarted(libc::E2BIG as u32));
}

#[test]
fn no_header_is_no_fault() {
    needs_namespaces!();
    let (code, streams) = Container::with(Hold::Open, Stdio::null()).ended();
    assert_eq!((code, streams), (Some(exit::DISMISSED), [vec![], vec![]]));
}

#[test]
fn malformed_messages_start_nothing() {
    needs_namespaces!();
    let refused = |sent: &[u8], open: bool| {
        let mut container = Container::start();
        container.send(sent);
        let stdin = container.stdin.take().filter(|_| open);
        let ended = container.ended();
        drop(stdin);
        ended == (Some(exit::MALFORMED), [vec![], vec![]])
    };
    // Beyond the bounds: at once, whatever else is to come.
    let good =
        Header { nonce: NONCE, arguments: 1, environment: 0, strings_len: 8, listens: false };
    for header in [
        Header { strings_len: STRINGS_MAX + 1, ..good },
        Header { strings_len: u32::MAX, ..good },
        Header { strings_len: 0, ..good },
        Header { arguments: ARGUMENTS_MAX + 1, ..good },
        Header { environment: ENVIRONMENT_MAX + 1, ..good },
    ] {
        assert!(refused(&header.encode(), true), "{header:?}");
    }
    // Neither a service nor none.
    let mut neither = good.encode();
    neither[Header::LEN - 4] = 2;
    assert!(refused(&neither, true));
    // Cut off anywhere; other counts than there are strings.
    let whole = message("/bin/echo", &[b"echo", b"started"], &[b"A=B"]);
    let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(12) };
    let mut runner = TestRunner::new(config);
    runner
        .run(&(1..whole.len()), |cut| {
            prop_assert!(refused(&whole[..cut], false), "cut at {}", cut);
            Ok(())
        })
        .unwrap();
    let strings = prop::collection::vec(prop::sample::select(&b"\0\0/a"[..]), 1..12);
    runner
        .run(&(0..6_u32, 0..6_u32, strings), |(arguments, environment, strings)| {
            let count = strings.iter().filter(|byte| **byte == 0).count() as u32;
            let right = count == 1 + arguments + environment && strings.ends_with(b"\0");
            prop_assume!(!right);
            prop_assert!(refused(&message_of(arguments, environment, &strings), true));
            Ok(())
        })
        .unwrap();
}

#[test]
fn input_that_could_be_read_again_is_refused() {
    needs_namespaces!();
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&message("/bin/cat", &[b"cat"], &[])).unwrap();
    io::Seek::rewind(&mut file).unwrap();
    let (code, streams) = Container::with(Hold::Open, file.into()).ended();
    assert_eq!((code, streams), (Some(exit::MALFORMED), [vec![], vec![]]));
}

#[test]
fn the_record_ends_both_streams() {
    needs_namespaces!();
    // Children in sessions of their own that never stop writing, and one that has only
    // stopped itself.
    let text = "for stream in 1 2; do
            setsid sh -c 'while echo late; do :; done' >&$stream &
        done
        setsid sh -c 'kill -STOP $$' &
        echo early; exit 7";
    let run = Container::start().run(&script(text), b"");
    assert_eq!(run.record, Record { left_behind: true, ..exited(7) });
    assert!(run.stdout.windows(6).any(|words| words == b"early\n"));
}

#[test]
fn those_who_ended_were_not_left_behind() {
    needs_namespaces!();
    let run = Container::start().run(&script("for i in 1 2 3; do (exit 9) & done; wait"), b"");
    assert_eq!(run.record, exited(0));
}

#[test]
fn forks_without_end_come_to_an_end() {
    needs_namespaces!();
    // Each has an orphan for init to reap.
    let text = "while :; do (true &); done &
        (while :; do (true &); done) &
        exec true";
    let run = Container::start().run(&script(text), b"");
    assert_eq!(run.record, Record { left_behind: true, ..exited(0) });
}

#[test]
fn records_of_others_are_words_like_any() {
    needs_namespaces!();
    let forged = exited(0).encode(b"another nonce...and another key.");
    let run = Container::start().run(&script("cat; cat /proc/1/mem; exit 4"), &forged);
    assert_eq!((run.stdout.as_slice(), run.record), (&forged[..], exited(4)));
    assert_eq!(Record::decode(&forged, &NONCE), None);
}

#[test]
fn streams_left_full_are_waited_for() {
    needs_namespaces!();
    let container = Container::start();
    executable(&container.directory.path().join("fill"), &programs::bytes("fill"));
    let run = container.run(&message("/run/dispatcher/fill", &[b"fill"], &[]), b"");
    assert_eq!(run.record, exited(0));
    assert!(run.stdout.len() >= 65536 && run.stderr.len() >= 65536);
}

#[test]
fn a_stream_without_reader_is_told_by_the_exit_code() {
    needs_namespaces!();
    let directory = directory();
    let mut command = command(directory.path(), INIT_PATH);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    child.stdin.take().unwrap().write_all(&script("exit 0")).unwrap();
    let status = wait_for("init's end", LIMIT, || child.try_wait().unwrap());
    assert_eq!(status.code(), Some(exit::UNWRITTEN));
}

#[test]
fn init_is_out_of_the_programs_reach() {
    needs_namespaces!();
    // What fails with init works with the shell itself, of the same user.
    let text = "exec 2>&1
        id -u; cat /proc/self/oom_score_adj
        for pid in $$ 1; do
            readlink /proc/$pid/fd/1 >/dev/null && echo fds $pid
            head -c 1 /proc/$pid/environ >/dev/null && echo environment $pid
            readlink /proc/$pid/exe
        done | sed \"s/$$/self/\"
        for signal in 1 2 3 6 9 11 15 17 19 20 31 34; do kill -$signal 1; done
        cat /proc/1/comm; ls /proc/self/fd | tr '\n' ' '";
    let run = Container::start().run(&script(text), b"");
    let words = String::from_utf8_lossy(&run.stdout);
    let told: Vec<_> = words.lines().filter(|line| !line.contains("ermission denied")).collect();
    let uid = if rootless() { "0" } else { "65534" };
    let shell = fs::canonicalize("/bin/sh").unwrap();
    let shell = shell.to_str().unwrap();
    let expected =
        [uid, "1000", "fds self", "environment self", shell, "dispatch-init", "0 1 2 3 "];
    assert_eq!(told, expected, "{words}");
    assert_eq!(run.record, exited(0));
}

/// Of the same user, it can be given limits with which it can't go on.
#[test]
fn an_init_that_fails_tells_nothing() {
    needs_namespaces!();
    let mut container = Container::start();
    container.send(&script("prlimit --pid 1 --nofile=0:0; kill -CHLD 1; sleep 1000"));
    assert_eq!(container.ended(), (Some(exit::REFUSED), [vec![], vec![]]));
}

#[test]
fn init_keeps_nothing_of_the_programs_input() {
    needs_namespaces!();
    let mut container = Container::start();
    let name = token();
    let text =
        format!("printf {name} >/proc/$$/comm; exec <&-; read forever </run/dispatcher/hold");
    container.send(&script(&text));
    wait_until("the program", LIMIT, || !host::named(&name).is_empty());
    // The streams, hold and signalfd; the pipe of the start is gone as well.
    let descriptors = format!("/proc/{}/fd", container.init().pid);
    wait_until("init to keep four descriptors", LIMIT, || {
        let entries = fs::read_dir(&descriptors).unwrap().flatten();
        let mut numbers: Vec<_> = entries.map(|entry| entry.file_name()).collect();
        numbers.sort();
        numbers == ["1", "2", "3", "4"]
    });
}

#[test]
fn everything_ends_with_the_dispatcher() {
    needs_namespaces!();
    // While init waits for a header, and for the strings.
    let header = &script("exit 0")[..Header::LEN + 3];
    for sent in [&b""[..], &header[..7], header] {
        let mut container = Container::start();
        container.init();
        container.send(sent);
        container.hold = None;
        let stdin = container.stdin.take();
        assert_eq!(container.ended().0, Some(exit::DISMISSED));
        drop(stdin);
    }
    // While the program runs, with others.
    let mut container = Container::start();
    container.send(&script("setsid sleep 1000 & sleep 1000 & echo up; wait"));
    let init = container.init();
    wait_until("all to run", LIMIT, || {
        let names = host::descendants(init.pid).into_iter().map(|process| process.name);
        names.filter(|name| name == "sleep").count() == 2
    });
    let family = host::descendants(init.pid);
    container.hold = None;
    let (code, [stdout, _]) = container.ended();
    assert_eq!((code, stdout.as_slice()), (Some(exit::DISMISSED), &b"up\n"[..]));
    wait_until("all to be gone", LIMIT, || !family.iter().any(Process::alive));
    // It was gone before init came.
    let container = Container::with(Hold::Unheld, Stdio::piped());
    assert_eq!(container.ended().0, Some(exit::DISMISSED));
}

#[test]
fn without_a_hold_it_goes_on_until_killed() {
    needs_namespaces!();
    let mut container = Container::with(Hold::Missing, Stdio::piped());
    let init = container.init();
    container.send(&script("exit 5"));
    wait_until("both records", LIMIT, || {
        let told = |stream: &Stream| record_at_end(&stream.0.lock().unwrap()) == Some(exited(5));
        container.streams.iter().all(told)
    });
    assert!(init.alive());
    init.signal(Signal::SIGKILL);
    wait_until("its end", LIMIT, || container.child.try_wait().unwrap().is_some());
}

#[test]
fn it_runs_as_pid_1_only() {
    let directory = directory();
    let status = Command::new(directory.path().join("init")).stdin(Stdio::null()).status().unwrap();
    assert_eq!(status.code(), Some(exit::REFUSED));
}
