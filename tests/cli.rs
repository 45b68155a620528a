//! The commands: exit codes, what goes to stdout and stderr, what files say.

mod common;

use std::{
    fs,
    io::{self, Read as _, Write as _},
    net::{Shutdown, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use common::{
    Dispatcher,
    dispatcher::{alone, command, plain},
    programs, scaled_ms, shared,
};
use serde_json::Value;

mod cli {
    mod doctor;
    pub mod services;
}

fn dispatcher() -> &'static Dispatcher {
    static SERVER: OnceLock<Dispatcher> = OnceLock::new();
    shared(&SERVER, || {
        let limits = format!(
            "[limits]\ntimeout = \"{}ms\"\nmemory = \"48MiB\"\noutput = \"64KiB\"\n",
            scaled_ms(2000)
        );
        let policies = [("jail", plain(&limits)), ("demo", plain(&limits))];
        Dispatcher::start([&policies[..], &[("service", cli::services::policy())]].concat())
    })
}

fn finish(command: &mut Command) -> Output {
    command.output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// A file in a directory that goes when the tests do.
fn file(name: &str, content: &str) -> PathBuf {
    static DIRECTORY: OnceLock<tempfile::TempDir> = OnceLock::new();
    let path = DIRECTORY.get_or_init(|| tempfile::tempdir().unwrap()).path().join(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(&path, content).unwrap();
    path
}

/// `dispatcher run` with this policy, program and arguments.
fn run(policy: &Path, options: &[&str], program: &str, args: &[&str]) -> Output {
    let (mut command, _cgroup) = alone();
    command.arg("run").arg("--policy").arg(policy).args(options);
    finish(command.arg(programs::path(program)).args(args))
}

fn call(options: &[&str], program: &str, args: &[&str]) -> Output {
    let mut command = command();
    command
        .args(["call", "--address", dispatcher().address(), "--namespace", "jail"])
        .args(options);
    command.arg("--binary").arg(programs::path(program));
    finish(command.arg("test/main").args(args))
}

type Ending<'a> = (&'a str, &'a [&'a str], i32, &'a str);

/// Program, arguments, exit code, verdict and reason on stderr.
const ENDINGS: [Ending; 11] = [
    ("act", &["print", "x"], 0, ""),
    ("act", &["exit", "3"], 3, "EXITED exit_nonzero"),
    ("act", &["exit", "125"], 125, "EXITED exit_nonzero"),
    ("act", &["raise", "15"], 143, "SIGNALLED signalled"),
    ("act", &["raise", "11"], 139, "SIGNALLED signalled"),
    ("act", &["forever"], 124, "TIMED_OUT timeout"),
    ("hog", &["mmap", "200m"], 137, "OUT_OF_MEMORY out_of_memory"),
    ("hog", &["stdout", "1m"], 137, "OUTPUT_EXCEEDED output"),
    ("syscall", &["native", "999"], 0, ""),
    ("attack", &["deadly-grandchild"], 159, "SYSCALL_DENIED syscall_denied"),
    ("act-dynamic", &[], 125, "REFUSED loader_missing"),
];

/// Exit codes, and one line on stderr for each but 0.
#[track_caller]
fn check_ending(what: &str, output: &Output, (program, args, code, verdict): Ending) {
    assert_eq!(output.status.code(), Some(code), "{what} {program} {args:?}: {output:?}");
    let stderr = text(&output.stderr);
    let lines: Vec<_> = stderr.lines().filter(|line| line.starts_with("dispatcher: ")).collect();
    if verdict.is_empty() {
        assert!(lines.is_empty(), "{what} {program} {args:?}: {stderr}");
    } else {
        assert_eq!(lines.len(), 1, "{what} {program} {args:?}: {stderr}");
        let expected = format!("dispatcher: {verdict}: ");
        assert!(lines[0].starts_with(&expected), "{:?} is not {expected:?}", lines[0]);
        assert!(lines[0].len() > expected.len(), "{:?} says why", lines[0]);
    }
}

#[test]
fn run_ends_as_the_program_did() {
    let policy = file(
        "run/demo.toml",
        &plain(&format!(
            "[limits]\ntimeout = \"{}ms\"\nmemory = \"48MiB\"\noutput = \"64KiB\"\n",
            scaled_ms(1000)
        )),
    );
    for ending in ENDINGS {
        let output = run(&policy, &[], ending.0, ending.1);
        check_ending("run", &output, ending);
    }
}

#[test]
fn call_ends_as_the_program_did() {
    for ending in ENDINGS {
        check_ending("call", &call(&[], ending.0, ending.1), ending);
    }
}

#[test]
fn output_and_errors_pass_through() {
    let policy = file("through/demo.toml", &plain(""));
    let args = &["hex", "00ff", "print", "out", "err", "complaint\n", "exit", "1"];
    for output in [run(&policy, &[], "act", args), call(&[], "act", args)] {
        assert_eq!(output.stdout, b"\0\xffout");
        let stderr = text(&output.stderr);
        assert!(stderr.contains("complaint\n"), "{stderr}");
        assert!(stderr.contains("dispatcher: EXITED exit_nonzero: "), "{stderr}");
    }
}

#[test]
fn input_comes_from_a_file_or_stdin() {
    let policy = file("input/demo.toml", &plain(""));
    let input = file("input/data", "from a file");
    let input = input.to_str().unwrap();
    assert_eq!(run(&policy, &["--input", input], "act", &["stdin"]).stdout, b"from a file");
    assert_eq!(call(&["--input", input], "act", &["stdin"]).stdout, b"from a file");

    let (mut command, _cgroup) = alone();
    let mut child = command
        .arg("run")
        .arg("--policy")
        .arg(&policy)
        .args(["--input", "-"])
        .arg(programs::path("act"))
        .arg("stdin")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"from a pipe").unwrap();
    assert_eq!(child.wait_with_output().unwrap().stdout, b"from a pipe");
}

#[test]
fn run_takes_limits_and_names() {
    let policy = file(
        "names/tenant.toml",
        &format!("{}\n[environment]\nallow = [\"WORD\"]\n", common::dispatcher::best_effort()),
    );
    let output = run(&policy, &["--env", "WORD=given"], "echo", &["--flag", "x"]);
    let facts = common::Facts::parse(&text(&output.stdout));
    // The namespace is the policy file's name.
    assert_eq!(facts.all("argv"), ["service", "tenant", "run", "main", "--flag", "x"]);
    assert!(facts.all("env").contains(&"WORD=given"));
    let output = run(&policy, &["--service", "s", "--method", "m"], "echo", &[]);
    let facts = common::Facts::parse(&text(&output.stdout));
    assert_eq!(facts.all("argv"), ["service", "tenant", "s", "m"]);

    let policy = file("names/plain.toml", &plain(""));
    let limit = format!("{}ms", scaled_ms(300));
    assert_eq!(run(&policy, &["--timeout", &limit], "act", &["forever"]).status.code(), Some(124));
    assert_eq!(
        run(&policy, &["--memory", "16MiB"], "hog", &["mmap", "64m"]).status.code(),
        Some(137)
    );
    assert_eq!(run(&policy, &["--memory", "1TiB"], "act", &[]).status.code(), Some(125));
    assert_eq!(run(&policy, &["--env", "SECRET=x"], "act", &[]).status.code(), Some(125));
    assert_eq!(run(&policy, &["--mode", "direct"], "act", &[]).status.code(), Some(125));

    // A whole directory, and the namespace by name.
    let directory = policy.parent().unwrap();
    let (mut command, _cgroup) = alone();
    let output = finish(
        command
            .arg("run")
            .arg("--policies")
            .arg(directory)
            .args(["--namespace", "plain"])
            .arg(programs::path("act"))
            .args(["print", "found"]),
    );
    assert_eq!(output.stdout, b"found", "{output:?}");
}

#[test]
fn json_is_the_report() {
    let policy = file("json/demo.toml", &plain(""));
    for output in [
        run(&policy, &["--json"], "act", &["print", "x", "exit", "3"]),
        call(&["--json"], "act", &["print", "x", "exit", "3"]),
    ] {
        assert_eq!(output.status.code(), Some(3));
        let told: Value = serde_json::from_slice(&output.stdout).unwrap();
        // `call` tells the whole reply, of which the report is a part.
        let report = told.get("report").unwrap_or(&told);
        assert_eq!(report["verdict"], "VERDICT_EXITED", "{report}");
        assert_eq!(report["exitCode"], 3, "{report}");
        assert!(report["artifactDigest"].as_str().unwrap().starts_with("sha256:"), "{report}");
        let enforced = report["enforced"].as_array().unwrap();
        assert!(enforced.contains(&Value::from("ns.pid")), "{report}");
    }
}

#[test]
fn call_sends_bytes_only_when_asked() {
    const PADDING: usize = 1 << 20;
    // A program that no other test sends; what follows its last section is never looked at.
    let program = file("sent/act", "");
    let mut bytes = programs::bytes("act").to_vec();
    bytes.resize(bytes.len() + PADDING, b'.');
    fs::write(&program, &bytes).unwrap();

    let (address, sent) = counting_relay();
    let sent_by_a_call = || {
        let before = sent.load(Ordering::SeqCst);
        let mut command = command();
        command.args(["call", "--address", &address, "--namespace", "jail", "--binary"]);
        let output = finish(command.arg(&program).args(["test/main", "print", "ran"]));
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        assert_eq!(output.stdout, b"ran");
        sent.load(Ordering::SeqCst) - before
    };
    let (first, second) = (sent_by_a_call(), sent_by_a_call());
    assert!(first > bytes.len(), "{first} bytes were sent of {}", bytes.len());
    assert!(second < PADDING / 10, "{second} bytes were sent again");
}

/// An address that leads to the shared server, and how many bytes came in by it.
fn counting_relay() -> (String, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let count = Arc::new(AtomicUsize::new(0));
    let sent = Arc::clone(&count);
    let server = dispatcher().address();
    thread::spawn(move || {
        for client in listener.incoming() {
            let (mut requests, mut server) = (client.unwrap(), TcpStream::connect(server).unwrap());
            let (mut answers, mut client) =
                (server.try_clone().unwrap(), requests.try_clone().unwrap());
            thread::spawn(move || io::copy(&mut answers, &mut client));
            let mut buffer = vec![0; 64 << 10];
            while let Ok(length @ 1..) = requests.read(&mut buffer) {
                sent.fetch_add(length, Ordering::SeqCst);
                if server.write_all(&buffer[..length]).is_err() {
                    break;
                }
            }
            server.shutdown(Shutdown::Both).ok();
        }
    });
    (address, count)
}

#[test]
fn print_request_prints_what_would_be_sent() {
    let request = |options: &[&str]| {
        let mut command = command();
        command.args(["call", "--print-request", "--namespace", "jail"]).args(options);
        let output = finish(command.arg("test/main").args(["a", "b"]));
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        serde_json::from_slice::<Value>(&output.stdout).unwrap()
    };
    let binary = programs::path("act");
    let printed = request(&["--binary", binary.to_str().unwrap(), "--timeout", "2s"]);
    assert_eq!(printed["namespace"], "jail");
    assert!(printed.to_string().contains("\"main\""), "{printed}");
    let about = ["--metadata", "x-user=ada", "--request-id", "r1", "--label", "team=a"];
    let printed = request(&about);
    assert_eq!(printed["executionContext"]["metadata.x-user"], "ada");
    assert_eq!(printed["options"]["requestId"], "r1");
    assert_eq!(printed["options"]["labels"]["team"], "a");
    let by_uri = request(&["--uri", "sha256:00"]);
    assert!(by_uri.to_string().contains("sha256:00"), "{by_uri}");
}

#[test]
fn call_finds_the_server_by_variable_and_says_when_there_is_none() {
    let mut found = command();
    found.env("DISPATCHER_ADDRESS", dispatcher().address()).args([
        "call",
        "--namespace",
        "jail",
        "--binary",
    ]);
    let output = finish(found.arg(programs::path("act")).args(["test/main", "print", "found"]));
    assert_eq!(
        (output.status.code(), output.stdout.as_slice()),
        (Some(0), b"found" as &[u8]),
        "{output:?}"
    );

    let mut nobody = command();
    nobody.args(["call", "--address", "127.0.0.1:1", "--namespace", "jail", "--binary"]);
    let output = finish(nobody.arg(programs::path("act")).arg("test/main"));
    assert_eq!(output.status.code(), Some(69), "{output:?}");
    let complaint = text(&output.stderr);
    assert!(complaint.starts_with("dispatcher: FAILED unreachable: "), "{complaint}");
    assert!(complaint.contains("127.0.0.1:1"), "{complaint}");
}

#[test]
fn call_says_when_the_connection_breaks() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    // Takes the call's first bytes, and goes.
    let server = thread::spawn(move || {
        let (mut socket, _) = listener.accept().unwrap();
        socket.read_exact(&mut [0; 64]).unwrap();
    });
    let mut broken = command();
    broken.args(["call", "--address", &address, "--namespace", "jail", "--binary"]);
    let output = finish(broken.arg(programs::path("act")).arg("test/main"));
    server.join().unwrap();
    assert_eq!(output.status.code(), Some(125), "{output:?}");
    let complaint = text(&output.stderr);
    assert!(complaint.starts_with("dispatcher: FAILED connection_lost: "), "{complaint}");
    assert_eq!(complaint.lines().count(), 1, "{complaint}");
}

#[test]
fn usage_errors_are_2() {
    for args in [
        &[][..],
        &["fly"],
        &["run"],
        &["call"],
        &["serve", "--nonsense"],
        &["policy"],
        &["run", "--timeout", "soon", "/bin/true"],
        &["run", "--cpus", "many", "/bin/true"],
        &["run", "--service", "a"],
        &["call", "--namespace", "x", "no-slash"],
        &["call", "--address", "nonsense", "--namespace", "x", "a/b"],
        &["call", "--address", "http://127.0.0.1:1", "--namespace", "x", "a/b"],
        &["call", "--metadata", "x", "--namespace", "x", "a/b"],
        &["call", "--label", "a=1", "--label", "a=2", "--namespace", "x", "a/b"],
        &["config", "check", "--config", "a.toml", "b.toml"],
    ] {
        let output = finish(command().args(args));
        assert_eq!(output.status.code(), Some(2), "{args:?}: {output:?}");
        assert!(output.stdout.is_empty() && !output.stderr.is_empty(), "{args:?}: {output:?}");
    }
    assert_eq!(finish(command().arg("--help")).status.code(), Some(0));
}

#[test]
fn policy_check_finds_all_faults_at_once() {
    let good = file("good/fine.toml", &plain("[limits]\nmemory = \"64MiB\"\n"));
    let output = finish(command().args(["policy", "check"]).arg(&good));
    assert_eq!(output.status.code(), Some(0), "{output:?}");

    let bad = file(
        "bad/broken.toml",
        "[limits]\nmemori = \"64MiB\"\ntimeout = 30\npids = \"lots\"\n[nework]\n",
    );
    file("bad/other.toml", "mode = \"fast\"\nextends = \"nobody\"\n");
    file("bad/cycle.toml", "extends = \"cycle\"\n");
    let output = finish(command().args(["policy", "check"]).arg(bad.parent().unwrap()));
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let told = format!("{}{}", text(&output.stdout), text(&output.stderr));
    for fault in [
        "broken.toml:2:1",
        "broken.toml:3:",
        "broken.toml:4:",
        "broken.toml:5:",
        "other.toml:1:",
        "other.toml:2:",
        "cycle.toml:1:",
        "memory",
        "30s",
    ] {
        assert!(told.contains(fault), "{fault} in:\n{told}");
    }
}

#[test]
fn policy_faults_of_every_kind() {
    let cases: &[(&str, &str)] = &[
        ("unknown unit", "[limits]\nmemory = \"64 miles\"\n"),
        ("bare number for a duration", "[limits]\ntimeout = 30\n"),
        ("too little memory", "[limits]\nmemory = \"1MiB\"\n"),
        ("unknown system call", "[seccomp]\nallow = [\"opne\"]\n"),
        ("unknown capability", "[capabilities]\nkeep = [\"CAP_FLY\"]\n"),
        ("unknown control", "best_effort = [\"luck\"]\n"),
        ("unknown mode", "mode = \"magic\"\n"),
        ("unknown network", "[network]\nmode = \"some\"\n"),
        ("star beside another", "[services]\nallow = [\"*\", \"a/b\"]\n"),
        (
            "relative bind",
            "[filesystem]\nbind = [{ source = \"srv\", target = \"/x\", read_only = true }]\n",
        ),
        (
            "bind over /proc",
            "[filesystem]\nbind = [{ source = \"/srv\", target = \"/proc\", read_only = true }]\n",
        ),
        (
            "bind with dots",
            "[filesystem]\nbind = [{ source = \"/srv\", target = \"/a/../proc\", read_only = true }]\n",
        ),
        ("root in direct mode", "mode = \"direct\"\n[identity]\nuser = \"root\"\n"),
        ("file system in direct mode", "mode = \"direct\"\n[filesystem]\nroot = \"host\"\n"),
        ("no network in direct mode", "mode = \"direct\"\n[network]\nmode = \"none\"\n"),
        ("seccomp in direct mode", "mode = \"direct\"\n[seccomp]\ndeny = [\"read\"]\n"),
        (
            "capabilities in direct mode",
            "mode = \"direct\"\n[capabilities]\nkeep = [\"CAP_CHOWN\"]\n",
        ),
        ("a digest of no kind", "[artifacts]\ndigests = [\"sha256:12\"]\n"),
        ("a relative interpreter", "[artifacts]\ninterpreters = [\"sh\"]\n"),
        ("a rate without time", "[admission]\nrate = \"100\"\n"),
        ("a key twice", "mode = \"jail\"\nmode = \"jail\"\n"),
        ("no TOML", "mode = jail\n"),
    ];
    for (what, content) in cases {
        let path = file("faults/fault.toml", content);
        let output = finish(command().args(["policy", "check"]).arg(&path));
        assert_eq!(output.status.code(), Some(1), "{what}: {output:?}");
        let told = format!("{}{}", text(&output.stdout), text(&output.stderr));
        assert!(told.contains("fault.toml:"), "{what} says where: {told}");
    }
}

/// What can't have the effect it seems to have is pointed out.
#[test]
fn policy_check_warns() {
    let policy =
        file("warn/warn.toml", "[seccomp]\nallow = [\"unshare\"]\n[limits]\noutput = \"16MiB\"\n");
    let output = finish(command().args(["policy", "check"]).arg(&policy));
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let told = text(&output.stderr);
    for line in ["warn.toml:2:", "warn.toml:4:"] {
        assert!(told.contains(line) && told.contains("warning"), "{line} in {told}");
    }
}

#[test]
fn policy_explain_tells_where_values_come_from() {
    let base = file(
        "explain/base.toml",
        "[limits]\nmemory = \"64MiB\"\n[services]\nallow = [\"greeter/*\"]\n",
    );
    file("explain/tenant.toml", "extends = \"base\"\n[limits]\npids = 7\n");
    let directory = base.parent().unwrap();
    let explain = |words: &[&str]| {
        let mut command = command();
        // The directory by variable: it beats the file and the default.
        command.env("DISPATCHER_POLICIES", directory).args(["policy", "explain"]).args(words);
        finish(&mut command)
    };
    let output = explain(&["tenant"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let told = text(&output.stdout);
    for word in ["64MiB", "base.toml", "tenant.toml", "pids", "timeout", "30s"] {
        assert!(told.contains(word), "{word} in:\n{told}");
    }
    let allowed = explain(&["tenant", "greeter/Hello"]);
    assert!(text(&allowed.stdout).to_lowercase().contains("allowed"), "{allowed:?}");
    let refused = explain(&["tenant", "other/Hello"]);
    assert!(text(&refused.stdout).to_lowercase().contains("refused"), "{refused:?}");
}

#[test]
fn schemas_are_json() {
    for words in [["policy", "schema"], ["config", "schema"]] {
        let output = finish(command().args(words));
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        let schema: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert!(schema["properties"].is_object(), "{words:?}");
    }
}

#[test]
fn config_check_is_as_strict() {
    let fine = file("config/fine.toml", "[server]\nconcurrency = 3\nmemory = \"1GiB\"\n");
    let output = finish(command().args(["config", "check"]).arg(&fine));
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let bad = file("config/bad.toml", "[server]\nconcurrenzy = 3\nmemory = \"most\"\n");
    let output = finish(command().args(["config", "check"]).arg(&bad));
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let told = format!("{}{}", text(&output.stdout), text(&output.stderr));
    assert!(told.contains("bad.toml:2:1") && told.contains("bad.toml:3:"), "{told}");
    let flag = finish(command().args(["config", "check", "--config"]).arg(&bad));
    assert_eq!((flag.status.code(), flag.stderr), (Some(1), output.stderr));
}

#[test]
fn version_and_doctor_speak_json() {
    let output = finish(command().args(["version", "--json"]));
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let version: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(version.to_string().contains(env!("CARGO_PKG_VERSION")), "{version}");
    assert!(text(&finish(command().arg("version")).stdout).contains(env!("CARGO_PKG_VERSION")));

    let policies = file("doctor/demo.toml", &plain(""));
    let (mut command, _cgroup) = alone();
    let output =
        finish(command.args(["doctor", "--json", "--policies"]).arg(policies.parent().unwrap()));
    let findings: Value = serde_json::from_slice(&output.stdout).unwrap();
    for control in ["ns.user", "cgroup.memory", "seccomp", "landlock"] {
        assert!(findings.to_string().contains(control), "{control} in {findings}");
    }
    // The tests' own policies can be enforced here, or none of them would pass.
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let policy = &findings["policies"]["policies"][0];
    assert_eq!((&policy["ok"], &policy["tried"]), (&true.into(), &true.into()), "{policy}");
    let (mut command, _cgroup) = alone();
    let readable = finish(command.args(["doctor", "--policies"]).arg(policies.parent().unwrap()));
    assert!(text(&readable.stdout).contains("cgroup"), "{readable:?}");
    assert!(text(&readable.stdout).contains("demo, mode jail: a program ran under it"));
}
