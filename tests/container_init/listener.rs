//! The socket that a service inherits: made by init, taken hold of from outside, and
//! nobody's but the program's.

use std::{
    fs,
    io::{ErrorKind, Read as _, Write as _},
    os::{
        fd::AsRawFd as _,
        unix::{fs::OpenOptionsExt as _, net::UnixStream},
    },
    path::{Path, PathBuf},
    process::Stdio,
};

use dispatcher::container::protocol::{GO, exit};
use nix::{
    libc,
    sys::socket::{getsockopt, sockopt::PeerCredentials},
};

use super::{
    common::{host, skip, token, wait_for, wait_until},
    contained::{Container, Hold, LIMIT, exited, impossible, message, script, service},
};

fn path(container: &Container) -> PathBuf {
    container.directory.path().join("grpc/inherited.sock")
}

/// A connection to what init listens at, and its inode.
fn reach(container: &Container) -> (UnixStream, fs::File) {
    let path = path(container);
    let connection = wait_for("init listens", LIMIT, || UnixStream::connect(&path).ok());
    // Before init is let go on it doesn't take the name away.
    let inode = fs::File::options().read(true).custom_flags(libc::O_PATH).open(&path).unwrap();
    (connection, inode)
}

fn connect(inode: &fs::File) -> std::io::Result<UnixStream> {
    UnixStream::connect(Path::new("/proc/self/fd").join(inode.as_raw_fd().to_string()))
}

fn say(container: &mut Container, text: &str) {
    container.send(&service(text));
}

#[test]
fn the_program_inherits_it_and_is_told_so() {
    needs_namespaces!();
    // Without a FIFO init has fewer descriptors: the number is the same.
    for hold in [Hold::Open, Hold::Missing] {
        let mut container = Container::serving(hold);
        let text = "echo $LISTEN_FDS $LISTEN_FDNAMES $GRPC_UNIX_SOCKET
            [ $LISTEN_PID = $$ ] && echo mine
            ls /proc/$$/fd; readlink /proc/$$/fd/3 | cut -c 1-7
            ls -A /run/grpc
            exit 3";
        say(&mut container, text);
        let init = container.init();
        let (mut connection, _inode) = reach(&container);
        let peer = getsockopt(&connection, PeerCredentials).unwrap();
        assert_eq!(peer.pid(), init.pid, "it is init who listens");
        connection.write_all(&[GO]).unwrap();
        let expected = "1 grpc /run/grpc/service.sock\nmine\n\
                        0\n1\n2\n3\nsocket:\n";
        if hold == Hold::Missing {
            wait_until("the program's words", LIMIT, || {
                container.streams[0].0.lock().unwrap().starts_with(expected.as_bytes())
            });
            init.signal(nix::sys::signal::Signal::SIGKILL);
            continue;
        }
        let run = container.told();
        assert_eq!(String::from_utf8_lossy(&run.stdout), expected, "{run:?}");
        assert_eq!(run.record, exited(3));
    }
}

#[test]
fn what_was_sent_comes_first_in_the_environment() {
    needs_namespaces!();
    let mut container = Container::serving(Hold::Open);
    let mut sent = message("/usr/bin/env", &[b"env", b"-0"], &[b"B=2", b"A=1"]);
    sent[dispatcher::container::protocol::Header::LEN - 4] = 1;
    container.send(&sent);
    reach(&container).0.write_all(&[GO]).unwrap();
    let stdout = container.told().stdout;
    let entries: Vec<_> = stdout.split(|byte| *byte == 0).map(String::from_utf8_lossy).collect();
    let (pid, others) = (&entries[5], [&entries[..5], &entries[6..]].concat());
    let expected = [
        "B=2",
        "A=1",
        "LISTEN_FDS=1",
        "LISTEN_FDNAMES=grpc",
        "GRPC_UNIX_SOCKET=/run/grpc/service.sock",
        "",
    ];
    assert_eq!(others, expected);
    let number = pid.strip_prefix("LISTEN_PID=").unwrap().parse::<u32>().unwrap();
    assert!((2..100).contains(&number), "of its own pid namespace: {number}");
}

#[test]
fn nobody_keeps_it_beyond_the_program() {
    needs_namespaces!();
    let mut container = Container::serving(Hold::Open);
    let name = token();
    let text = format!("printf {name} >/proc/$$/comm; read forever");
    say(&mut container, &text);
    let (mut connection, inode) = reach(&container);
    assert!(connect(&inode).is_ok(), "others may wait already");
    connection.write_all(&[GO]).unwrap();
    assert_eq!(connection.read(&mut [0]).unwrap(), 0, "init hangs up");
    wait_until("the program", LIMIT, || !host::named(&name).is_empty());
    assert!(!path(&container).exists(), "its name is gone before the program is there");
    assert!(connect(&inode).is_ok(), "and it listens");
    let init = container.init();
    wait_until("init has no socket", LIMIT, || {
        let entries = fs::read_dir(format!("/proc/{}/fd", init.pid)).unwrap().flatten();
        let links = entries.map(|entry| fs::read_link(entry.path()).unwrap_or_default());
        !links.into_iter().any(|link| link.to_string_lossy().starts_with("socket:"))
    });
    // The end of its input is the program's.
    container.stdin = None;
    let ended = |container: &Container| {
        container
            .streams
            .iter()
            .all(|stream| super::contained::record_at_end(&stream.0.lock().unwrap()).is_some())
    };
    wait_until("both records", LIMIT, || ended(&container));
    let refused = connect(&inode).map_err(|error| error.kind()).err();
    assert_eq!(refused, Some(ErrorKind::ConnectionRefused), "init is still there, nobody listens");
    assert!(init.alive());
}

#[test]
fn nothing_starts_before_the_word() {
    needs_namespaces!();
    for (word, code) in [
        (&b"x"[..], exit::MALFORMED),
        (b"\0", exit::MALFORMED),
        // Somebody who goes without a word.
        (b"", exit::DISMISSED),
    ] {
        let mut container = Container::serving(Hold::Open);
        say(&mut container, "echo started");
        let (mut connection, _inode) = reach(&container);
        connection.write_all(word).unwrap();
        drop(connection);
        assert_eq!(container.ended(), (Some(code), [vec![], vec![]]), "{word:?}");
    }
}

#[test]
fn who_is_not_reached_goes_with_the_dispatcher() {
    needs_namespaces!();
    for reached in [false, true] {
        let mut container = Container::serving(Hold::Open);
        say(&mut container, "echo started");
        let path = path(&container);
        wait_until("init listens", LIMIT, || path.exists());
        let connection = reached.then(|| reach(&container));
        container.hold = None;
        assert_eq!(container.ended(), (Some(exit::DISMISSED), [vec![], vec![]]));
        drop(connection);
    }
}

#[test]
fn without_a_place_of_its_own_there_is_no_service() {
    needs_namespaces!();
    // No directory; one in which there is something of that name.
    let mut container = Container::with(Hold::Open, Stdio::piped());
    say(&mut container, "echo started");
    assert_eq!(container.ended(), (Some(exit::DEAF), [vec![], vec![]]));
    let mut container = Container::serving(Hold::Open);
    fs::write(path(&container), "").unwrap();
    say(&mut container, "echo started");
    assert_eq!(container.ended(), (Some(exit::DEAF), [vec![], vec![]]));
}

#[test]
fn others_get_none() {
    needs_namespaces!();
    let container = Container::serving(Hold::Open);
    let run = container.run(&script("env | grep -c LISTEN; ls -A /run/grpc; ls /proc/$$/fd"), b"");
    assert_eq!(String::from_utf8_lossy(&run.stdout), "0\n0\n1\n2\n");
}
