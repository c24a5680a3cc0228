//! Root keys from a command: what it prints, how it fails, how often it is asked.
//!
//! The providers are small shell scripts; no network is needed. A failing one is an error on use
//! that says what happened, never a server that does not start, and it takes nothing from a
//! session that holds its root keys.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use postgres::Client;
use rekey_core::cipher::RootKey;
use rekey_core::root_keyring::RootKeyring;
use rekey_tests::cluster::{is_root, runs};
use rekey_tests::{Ask, Cluster, Options, wait_until};

const OPEN: &str = "SELECT decrypt_col(c) FROM t";

/// A server whose provider is the script `provider` in its folder.
struct Served {
    cluster: Cluster,
    keyring: String,
}

impl Served {
    /// With a database `app`, a key and one sealed row, made under the keyring file, which then
    /// moves behind a command: each of its runs adds a line to the file `asked`.
    fn start(options: Options) -> Served {
        let cluster = Cluster::start(options);
        cluster.database("app").connect().run(
            "SELECT rekey.create_key('pii');
             CREATE TABLE t AS SELECT encrypt_col('one', 'pii') AS c",
        );
        let keyring = fs::read_to_string(cluster.root_key_file()).expect("the keyring");
        let served = Served { cluster, keyring };
        served.provide(&served.printing());
        served.cluster.append("rekey.root_key_file = ''");
        served.cluster.append(&format!(
            "rekey.root_key_command = '{}'",
            served.path("provider").display()
        ));
        served.cluster.restart("fast");
        served
    }

    fn path(&self, name: &str) -> PathBuf {
        self.cluster.dir().join(name)
    }

    /// Puts a script in the provider's place.
    fn provide(&self, script: &str) {
        let asked = self.path("asked");
        let script = format!("#!/bin/sh\necho . >> {}\n{script}\n", asked.display());
        let draft = self.path("provider.new");
        self.cluster.write_file(&draft, script.as_bytes(), 0o700);
        // A script that is running is not written into.
        fs::rename(&draft, self.path("provider")).expect("the provider in place");
    }

    fn printing(&self) -> String {
        format!("cat <<'END'\n{}\nEND", self.keyring.trim_end())
    }

    /// How often the provider was asked.
    fn asked(&self) -> usize {
        fs::read_to_string(self.path("asked")).map_or(0, |text| text.lines().count())
    }

    fn connect(&self) -> Client {
        self.cluster.connect("app")
    }

    fn set(&self, line: &str) {
        self.cluster.append(line);
        let mut client = self.connect();
        self.cluster.reload(&mut client);
    }
}

#[test]
fn the_command_gives_the_root_keys() {
    let served = Served::start(Options::unloaded());
    let mut client = served.connect();
    assert_eq!(client.text(OPEN), "one");
    assert!(client.truth("SELECT rekey.ready()"));
    client.run("SELECT rotate_key('pii'); INSERT INTO t VALUES (encrypt_col('two', 'pii'))");
    assert_eq!(client.column(&format!("{OPEN} ORDER BY 1")), ["one", "two"]);
    let mut second = served.cluster.empty_database("second", "").connect();
    second.run("CREATE EXTENSION pg_rekey");
    let id = client.text("SELECT root_id FROM rekey.root_keys");
    assert_eq!(second.text("SELECT rekey.init_root_key()"), id);
}

#[test]
fn under_preload_it_runs_once_and_every_session_inherits_what_it_gave() {
    let served = Served::start(Options::preloaded());
    assert_eq!(served.asked(), 1, "at start");
    for _ in 0..3 {
        let mut client = served.connect();
        assert_eq!(client.text(OPEN), "one");
        client.run("SELECT rotate_key('pii')");
        assert_eq!(
            client.number("SELECT count(*) FROM rekey.root_keys WHERE held_here"),
            1
        );
        served.cluster.reload(&mut client);
        assert_eq!(
            client.text("SELECT decrypt_col(encrypt_col('x', 'pii'))"),
            "x"
        );
    }
    assert_eq!(served.asked(), 1, "neither a session nor a reload asks");
    assert_eq!(
        served.connect().number("SELECT rekey.reload_root_keys()"),
        1
    );
    assert_eq!(served.asked(), 2, "reload_root_keys asks");
}

#[test]
fn without_preload_a_session_asks_once() {
    let served = Served::start(Options::unloaded());
    let before = served.asked();
    let mut client = served.connect();
    for _ in 0..20 {
        client.run("SELECT rotate_key('pii'); INSERT INTO t VALUES (encrypt_col('x', 'pii'))");
    }
    assert_eq!(client.number("SELECT count(decrypt_col(c)) FROM t"), 21);
    assert_eq!(served.asked(), before + 1);
}

#[test]
fn two_sources_are_refused_at_use() {
    let served = Served::start(Options::unloaded());
    let mut warm = served.connect();
    assert_eq!(warm.text(OPEN), "one");
    served.set(&format!(
        "rekey.root_key_file = '{}'",
        served.cluster.root_key_file().display()
    ));
    served
        .connect()
        .refuse(OPEN, "F0000")
        .names("rekey.root_key_file")
        .names("rekey.root_key_command");
    assert!(!served.connect().truth("SELECT rekey.ready()"));
    warm.run("SELECT rotate_key('pii'); INSERT INTO t VALUES (encrypt_col('two', 'pii'))");
    assert_eq!(warm.column(&format!("{OPEN} ORDER BY 1")), ["one", "two"]);
    served.set("rekey.root_key_command = ''");
    assert_eq!(
        served.connect().text("SELECT count(decrypt_col(c)) FROM t"),
        "2"
    );
}

#[test]
fn each_failure_says_what_happened_and_the_next_answer_heals_it() {
    let served = Served::start(Options::unloaded());
    let secret = served
        .keyring
        .split('"')
        .find(|word| word.len() == 64)
        .expect("the key in the keyring")
        .to_owned();
    for (script, code, said) in [
        ("exit 3", "58000", "status 3"),
        ("/no/such/program", "58000", "status 127"),
        ("kill -9 $$", "58000", "signal 9"),
        ("kill -TERM $$", "58000", "signal 15"),
        ("true", "F0000", "rekey.root_key_command printed"),
        ("echo garbage", "F0000", "rekey.root_key_command printed"),
        (
            "head -c 1048577 /dev/zero",
            "F0000",
            "more than 1048576 bytes",
        ),
        ("cat /dev/zero", "F0000", "more than 1048576 bytes"),
        // Right at first, then too much: nothing of it is used.
        (
            "PRINT; echo trailing",
            "F0000",
            "rekey.root_key_command printed",
        ),
        ("PRINT; exit 1", "58000", "status 1"),
    ] {
        served.provide(&script.replace("PRINT", &format!("{}\n:", served.printing())));
        let mut client = served.connect();
        let refusal = client.refuse(OPEN, code).names(said);
        assert!(!refusal.text().contains(&secret), "{refusal:?}");
        assert!(!client.truth("SELECT rekey.ready()"), "{script}");
        let again = client.refuse(OPEN, code).names(said);
        assert!(again.detail.contains("not asked again"), "{again:?}");
        client
            .refuse("SELECT rekey.reload_root_keys()", code)
            .names(said);
        served.provide(&served.printing());
        client.run("SELECT rekey.reload_root_keys()");
        assert_eq!(client.text(OPEN), "one", "after {script}");
    }
    assert!(
        !served.cluster.log().contains(&secret),
        "the key is in the log"
    );
}

#[test]
fn exactly_one_mebibyte_is_read_whole() {
    let served = Served::start(Options::unloaded());
    // White space around the document is free.
    let keyring = served.keyring.trim_end();
    for (bytes, answer) in [(1 << 20, Ok(())), ((1 << 20) + 1, Err("more than"))] {
        let room = bytes - keyring.len();
        served.provide(&format!("printf '%s%{room}s' '{keyring}' ''"));
        match (served.connect().attempt(OPEN), answer) {
            (Ok(()), Ok(())) => {}
            (Err(refusal), Err(said)) => assert!(refusal.detail.contains(said), "{refusal:?}"),
            (other, _) => panic!("{bytes} bytes gave {other:?}"),
        }
    }
}

#[test]
fn a_provider_that_is_down_is_not_asked_for_every_query() {
    let served = Served::start(Options::unloaded());
    served.provide("echo 'cannot reach the provider' >&2; exit 1");
    let mut client = served.connect();
    let before = served.asked();
    for _ in 0..50 {
        client.refuse(OPEN, "58000");
    }
    assert!(
        served.asked() - before <= 2,
        "asked {} times",
        served.asked() - before
    );
    served.provide(&served.printing());
    wait_until("the session asks again by itself", || {
        client.attempt(OPEN).is_ok()
    });
    assert_eq!(client.text(OPEN), "one");
}

#[test]
fn a_root_key_that_it_does_not_have_is_not_asked_for_every_query() {
    let served = Served::start(Options::unloaded());
    let other = Cluster::start(Options::unloaded());
    other.database("other");
    let wrong = fs::read_to_string(other.root_key_file()).expect("another keyring");
    served.provide(&format!("cat <<'END'\n{}\nEND", wrong.trim_end()));
    let mut client = served.connect();
    let id = client.text("SELECT encode(root_id, 'hex') FROM rekey.root_key");
    let before = served.asked();
    for _ in 0..50 {
        client.refuse(OPEN, "F0000").names(&id);
    }
    client.run("SELECT count(*) FROM rekey.root_keys, generate_series(1, 50)");
    client.run("SELECT rekey.holds_root_key(md5(i::text)) FROM generate_series(1, 50) i");
    assert!(
        served.asked() - before <= 2,
        "asked {} times",
        served.asked() - before
    );
}

#[test]
fn watching_the_root_keys_asks_nobody() {
    let served = Served::start(Options::unloaded());
    let mut client = served.connect();
    client.run(
        "BEGIN; SET LOCAL session_replication_role = replica;
         INSERT INTO rekey.root_key SELECT '\\x00112233445566778899aabbccddeeff', root_check,
             'previous' FROM rekey.root_key; COMMIT",
    );
    let held = "SELECT held_here FROM rekey.root_keys ORDER BY state";
    assert_eq!(client.column(held), ["t", "f"]);
    let before = served.asked();
    // Longer than a session remembers what the command did not have.
    let begin = Instant::now();
    wait_until("seven seconds have passed", || {
        assert_eq!(client.column(held), ["t", "f"]);
        client.run("SELECT rotate_key('pii')");
        begin.elapsed() > Duration::from_secs(7)
    });
    assert_eq!(served.asked(), before);
}

#[test]
fn a_failing_provider_takes_nothing_from_a_session_that_holds_the_keys() {
    let served = Served::start(Options::unloaded());
    let mut warm = served.connect();
    assert_eq!(warm.text(OPEN), "one");
    served.provide("exit 1");
    warm.refuse("SELECT rekey.reload_root_keys()", "58000");
    warm.run("SELECT rotate_key('pii'); INSERT INTO t VALUES (encrypt_col('two', 'pii'))");
    assert_eq!(warm.column(&format!("{OPEN} ORDER BY 1")), ["one", "two"]);
    assert!(warm.truth("SELECT rekey.ready()"));
}

#[test]
fn a_failing_command_does_not_keep_the_server_from_starting() {
    let served = Served::start(Options::preloaded());
    served.provide("echo 'cannot reach the provider' >&2; exit 3");
    served.cluster.restart("fast");
    let log = served.cluster.log();
    assert!(
        log.contains("WARNING:  pg_rekey: the root key is not available"),
        "{log}"
    );
    assert!(
        log.contains("root key command: cannot reach the provider"),
        "{log}"
    );
    let mut client = served.connect();
    assert_eq!(client.number("SELECT 1"), 1);
    client.refuse(OPEN, "58000").names("status 3");
    served.provide(&served.printing());
    assert_eq!(
        served.connect().text(OPEN),
        "one",
        "a new session asks anew"
    );
}

#[test]
fn what_it_says_goes_to_the_log_line_by_line_and_is_bounded() {
    let served = Served::start(Options::unloaded());
    served.provide(&format!(
        "i=0; while [ $i -lt 200 ]; do i=$((i + 1)); echo \"line $i of noise\" >&2; done
         head -c 100000 /dev/zero | tr '\\0' x >&2; printf '\\nlast \\033[31mred\\377' >&2\n{}",
        served.printing()
    ));
    let (mut client, notices) = served.cluster.connect_noticing("app");
    client.run("SET client_min_messages = debug5");
    assert_eq!(client.text(OPEN), "one");
    let log = served.cluster.log();
    assert!(
        log.contains("LOG:  pg_rekey: root key command: line 1 of noise\n"),
        "{log}"
    );
    assert!(log.contains("root key command: line 50 of noise\n"));
    assert!(
        !log.contains("line 51 of noise"),
        "more than the bound was logged"
    );
    assert!(log.contains("root key command: (152 more lines)"), "{log}");
    let said = notices.lock().expect("the notices").join("\n");
    assert!(!said.contains("of noise"), "the client was told: {said}");
    served.provide(&format!(
        "printf 'last \\033[31mred\\377 word' >&2\n{}",
        served.printing()
    ));
    client.run("SELECT rekey.reload_root_keys()");
    wait_until("the line without an end is logged", || {
        served
            .cluster
            .log()
            .contains("root key command: last  [31mred\u{fffd} word\n")
    });
}

#[test]
fn a_hanging_command_is_killed_with_all_that_it_started() {
    let served = Served::start(Options::unloaded());
    served.set("rekey.root_key_command_timeout = '300ms'");
    for script in [
        "sleep 7201 & sleep 7201",
        "sleep 7201 &",
        "exec >&- 2>&-; sleep 7201",
    ] {
        served.provide(script);
        let begin = Instant::now();
        served
            .connect()
            .refuse(OPEN, "58000")
            .names("300 ms")
            .names("rekey.root_key_command_timeout");
        assert!(begin.elapsed() < Duration::from_secs(60));
        wait_until("nothing of it is left", || !runs("sleep 7201"));
    }
}

/// Process 1 of a container takes an orphan that a signal has ended for a backend that has crashed,
/// and ends every session.
#[test]
fn a_killed_command_restarts_no_server_that_is_process_1_of_a_container() {
    let served = Served::start(Options::preloaded());
    let mut warm = served.connect();
    assert_eq!(warm.text(OPEN), "one");
    served.set("rekey.root_key_command_timeout = '300ms'");
    served.cluster.stop("fast");
    served.cluster.boot_as_process_one();
    let mut warm = served.connect();
    assert_eq!(warm.text(OPEN), "one");
    let reload = "SELECT rekey.reload_root_keys()";
    for script in [
        "sleep 7205 & sleep 7205",
        "sleep 7205 | cat; sleep 7205",
        "(sleep 7205 & sleep 7205) & sleep 7205",
        "sleep 7205 >/dev/null 2>&1 & exit 3",
    ] {
        served.provide(script);
        served.connect().refuse(reload, "58000");
        wait_until("nothing of it is left", || !runs("7205"));
        assert_eq!(served.connect().text(OPEN), "one", "{script}");
        assert_eq!(warm.text(OPEN), "one", "{script}");
    }
    served.provide("sleep 7205 & sleep 7205");
    served.set("rekey.root_key_command_timeout = '1h'");
    let mut ended = served.connect();
    let pid = ended.number("SELECT pg_backend_pid()");
    std::thread::scope(|scope| {
        scope.spawn(|| {
            wait_until("the command runs", || runs("sleep 7205"));
            warm.run(&format!("SELECT pg_terminate_backend({pid})"));
        });
        assert!(ended.simple_query(reload).is_err());
    });
    wait_until("nothing of it is left", || !runs("7205"));
    assert_eq!(served.connect().text(OPEN), "one");
    assert_eq!(warm.text(OPEN), "one");
    // The postmaster itself, while it starts.
    drop(warm);
    served
        .cluster
        .append("rekey.root_key_command_timeout = '2s'");
    served.cluster.stop("fast");
    served.cluster.boot_as_process_one();
    wait_until("nothing of it is left", || !runs("7205"));
    served.provide(&served.printing());
    assert_eq!(served.connect().text(OPEN), "one");
    let log = served.cluster.log();
    assert!(log.contains("killed after 2000 ms"), "{log}");
    assert!(!log.contains("any other active server processes"), "{log}");
}

/// A command that has become another user, as with sudo, is beyond the server's signals.
#[test]
fn a_command_that_cannot_be_killed_keeps_no_session() {
    if !is_root() {
        println!("not tried: it takes root to make a program that becomes root");
        return;
    }
    let served = Served::start(Options::unloaded());
    let become_root = served.path("become-root");
    fs::copy("/usr/bin/setpriv", &become_root).expect("a copy of setpriv");
    fs::set_permissions(&become_root, fs::Permissions::from_mode(0o4755)).expect("its mode");
    served.set("rekey.root_key_command_timeout = '300ms'");
    // Ends with the test, whatever becomes of it.
    let waits = served.path("waits");
    fs::write(&waits, "").expect("a file");
    served.cluster.append(&format!(
        "rekey.root_key_command = 'exec {} --reuid=0 --regid=0 --clear-groups sh -c \
         \"while test -e {}; do sleep 0.1; done\"'",
        become_root.display(),
        waits.display()
    ));
    served.cluster.reload(&mut served.connect());
    let begin = Instant::now();
    served.connect().refuse(OPEN, "58000").names("300 ms");
    assert!(begin.elapsed() < Duration::from_secs(30));
    assert!(runs("while test -e"), "it was killed: nothing is shown");
    fs::remove_file(waits).expect("its end");
    wait_until("nothing of it is left", || !runs("while test -e"));
}

#[test]
fn a_slow_command_is_waited_for() {
    let served = Served::start(Options::unloaded());
    served.provide(&format!("sleep 1; {}", served.printing()));
    let begin = Instant::now();
    assert_eq!(served.connect().text(OPEN), "one");
    assert!(begin.elapsed() >= Duration::from_secs(1));
}

#[test]
fn a_cancel_a_timeout_and_a_terminated_session_end_it() {
    let served = Served::start(Options::unloaded());
    served.set("rekey.root_key_command_timeout = '1h'");
    served.provide("sleep 7202 & sleep 7202");
    let mut admin = served.connect();
    let waiting = |admin: &mut Client| {
        wait_until("the command runs", || runs("sleep 7202"));
        let pid = "SELECT pid FROM pg_stat_activity WHERE query LIKE '%the one that waits%' AND \
                   pid <> pg_backend_pid()";
        admin.number(pid)
    };
    let open = format!("{OPEN} /* the one that waits */");

    let mut client = served.connect();
    client.run("SET statement_timeout = '300ms'");
    client.fail(&open, "57014");
    wait_until("nothing of it is left", || !runs("sleep 7202"));
    client.run("RESET statement_timeout");
    let canceller = client.cancel_token();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            waiting(&mut admin);
            canceller.cancel_query(postgres::NoTls).expect("a cancel");
        });
        client.fail(&open, "57014");
    });
    wait_until("nothing of it is left", || !runs("sleep 7202"));
    assert_eq!(client.number("SELECT 1"), 1);

    for end in ["terminate", "kill"] {
        let mut client = served.connect();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let pid = waiting(&mut admin);
                if end == "terminate" {
                    admin.run(&format!("SELECT pg_terminate_backend({pid})"));
                } else {
                    served.cluster.kill_backend(pid);
                }
            });
            assert!(client.simple_query(&open).is_err());
        });
        if end == "terminate" {
            wait_until("nothing of it is left", || !runs("sleep 7202"));
        }
    }
    wait_until("the shell is gone with its backend", || {
        !runs(&format!("sh -c {}", served.path("provider").display()))
    });
    let provider = served.path("provider").display().to_string();
    // Nobody could kill the grandchildren of a backend that was killed; they are ours to end.
    for process in fs::read_dir("/proc").expect("/proc").flatten() {
        let line = fs::read(process.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line);
        if line.contains("7202") || line.contains(&provider) {
            let pid = process
                .file_name()
                .to_string_lossy()
                .parse()
                .expect("a pid");
            served.cluster.kill_backend(pid);
        }
    }
}

#[test]
fn the_command_inherits_nothing_but_its_three_descriptors() {
    let served = Served::start(Options::unloaded());
    let seen = served.path("seen");
    served.provide(&format!(
        "{{ ls -l /proc/$$/fd; grep -E 'SigBlk|SigIgn' /proc/self/status; }} > {} 2>&1\n{}",
        seen.display(),
        served.printing()
    ));
    assert_eq!(served.connect().text(OPEN), "one");
    let seen = fs::read_to_string(seen).expect("what it saw");
    let null = seen
        .lines()
        .find(|line| line.contains(" 0 -> "))
        .expect("a stdin");
    assert!(null.ends_with("/dev/null"), "{seen}");
    // The shell keeps the script itself open, and nothing else.
    let open = seen.lines().filter(|line| line.contains(" -> "));
    let others: Vec<&str> = open
        .filter(|line| !line.contains("/provider") && !line.contains("pipe:"))
        .filter(|line| !line.ends_with("/dev/null") && !line.contains("/seen"))
        .collect();
    assert_eq!(others, Vec::<&str>::new(), "{seen}");
    // Of grep itself: the shell blocks signals while it forks. 32 and 33 are glibc's own.
    let settable = !(0b11_u64 << 31);
    for mask in ["SigBlk", "SigIgn"] {
        let line = seen.lines().find(|line| line.starts_with(mask));
        let digits = line
            .and_then(|line| line.split('\t').nth(1))
            .expect("a mask");
        let signals = u64::from_str_radix(digits, 16).expect("hex digits");
        assert_eq!(signals & settable, 0, "{seen}");
    }
}

#[test]
fn rotation_under_a_command_needs_the_id_of_a_key_that_it_serves() {
    let served = Served::start(Options::unloaded());
    let mut client = served.connect();
    let old = client.text("SELECT root_id FROM rekey.root_keys");
    client
        .refuse("SELECT rekey.rotate_root_key()", "22023")
        .hints("rotate_root_key(root_id)");
    let other = Cluster::start(Options::unloaded());
    let new = other
        .database("other")
        .connect()
        .text("SELECT root_id FROM rekey.root_keys");
    let entry = |keyring: &str| {
        let begin = keyring.find('[').expect("a list") + 1;
        keyring[begin..keyring.rfind(']').expect("its end")].to_owned()
    };
    let added = fs::read_to_string(other.root_key_file()).expect("another keyring");
    let both = format!(
        "{{\"version\":1,\"keys\":[{},{}]}}",
        entry(&served.keyring),
        entry(&added)
    );
    client
        .refuse(&format!("SELECT rekey.rotate_root_key('{new}')"), "F0000")
        .names(&new);
    served.provide(&format!("echo '{both}'"));
    client.run("SELECT rekey.reload_root_keys()");
    assert_eq!(
        client.text(&format!("SELECT rekey.rotate_root_key('{new}')")),
        new
    );
    client.run("SELECT rotate_key('pii'); INSERT INTO t VALUES (encrypt_col('two', 'pii'))");
    client.run(&format!("SELECT rekey.retire_root_key('{old}')"));
    let mut fresh = served.connect();
    assert_eq!(fresh.column(&format!("{OPEN} ORDER BY 1")), ["one", "two"]);
}

/// A parallel worker has what the server has loaded at its start, and nothing of its leader's.
#[test]
fn check_says_when_new_sessions_and_parallel_workers_ask_the_command() {
    let served = Served::start(Options::preloaded());
    let mut warm = served.connect();
    let asks = "SELECT count(*) FROM rekey.check() WHERE object = 'setting rekey.root_key_command'
                   AND finding LIKE '%parallel%'";
    assert_eq!(warm.number(asks), 0);
    let new = RootKey::from_slice(&[7; 32]).expect("32 bytes");
    let mut ring = RootKeyring::parse(served.keyring.as_bytes()).expect("the keyring");
    let old = ring.ids().next().expect("the first root key");
    let id = new.id();
    ring.push(new, "2026-01-01T00:00:00Z".to_owned())
        .expect("a new root key");
    served.provide(&format!("cat <<'END'\n{}END", ring.to_json().as_str()));
    warm.run(&format!("SELECT rekey.rotate_root_key('{id}')"));
    assert_eq!(warm.number(asks), 0, "the old root key opens every slot");
    warm.run(&format!("SELECT rekey.retire_root_key('{old}')"));
    assert_eq!(warm.number(asks), 1);
    assert_eq!(warm.text(OPEN), "one");
    // What it warns of: the session holds the root key, and its query asks.
    let before = served.asked();
    warm.run(
        "SET parallel_setup_cost = 0; SET parallel_tuple_cost = 0;
         SET min_parallel_table_scan_size = 0; SET parallel_leader_participation = off",
    );
    assert_eq!(warm.text(OPEN), "one");
    assert_eq!(served.asked(), before + 1);
    served.cluster.restart("fast");
    assert_eq!(served.connect().number(asks), 0);
}

#[test]
fn a_signal_that_ends_the_shell_itself_is_named() {
    let served = Served::start(Options::unloaded());
    served.set("rekey.root_key_command = 'kill -9 $$'");
    served
        .connect()
        .refuse(OPEN, "58000")
        .names("ended by signal 9: Killed");
    served.set("rekey.root_key_command = 'exec /no/such/program'");
    served
        .connect()
        .refuse(OPEN, "58000")
        .names("status 127")
        .names("no such program");
}

#[test]
fn every_outage_of_the_provider_hurts_no_session_that_holds_the_keys_and_keeps_no_server_down() {
    let served = Served::start(Options::preloaded());
    served.set("rekey.root_key_command_timeout = '1500ms'");
    let other = Cluster::start(Options::unloaded());
    other.database("other");
    let wrong = fs::read_to_string(other.root_key_file()).expect("another keyring");
    let wrong = format!("cat <<'END'\n{}\nEND", wrong.trim_end());
    let right = served.printing();
    let outages = [
        (
            "down",
            "echo 'curl: (7) Failed to connect' >&2; exit 7",
            "58000",
        ),
        (
            "wrong token",
            "echo 'curl: (22) error: 403' >&2; exit 22",
            "58000",
        ),
        (
            "sealed",
            "echo 'curl: (22) error: 503' >&2; exit 22",
            "58000",
        ),
        ("without an answer", ":", "F0000"),
        ("garbage", "head -c 4096 /dev/urandom", "F0000"),
        (
            "an error page",
            "echo '<html>503 Service Unavailable</html>'",
            "F0000",
        ),
        ("a megabyte and more", "head -c 1048577 /dev/zero", "F0000"),
        ("hanging", "exec sleep 7203", "58000"),
        (
            "hanging in its answer",
            "printf '{\"version\":1'; exec sleep 7203",
            "58000",
        ),
        ("another server's keys", wrong.as_str(), "F0000"),
        ("slow", &format!("sleep 0.7\n{right}"), ""),
    ];
    let mut rows = 1;
    for (outage, script, code) in outages {
        let mut warm = served.connect();
        assert_eq!(warm.number("SELECT count(decrypt_col(c)) FROM t"), rows);
        served.provide(script);
        let reload = "SELECT rekey.reload_root_keys()";
        if code.is_empty() || outage == "another server's keys" {
            warm.run(reload); // it is well-formed
        } else {
            warm.refuse(reload, code);
        }
        warm.run("INSERT INTO t VALUES (encrypt_col('more', 'pii'))");
        rows += 1;
        assert_eq!(
            warm.number("SELECT count(decrypt_col(c)) FROM t"),
            rows,
            "{outage}"
        );
        served.cluster.restart("fast");
        let mut cold = served.connect();
        assert_eq!(cold.number("SELECT count(c) FROM t"), rows, "{outage}: up");
        if code.is_empty() {
            assert_eq!(cold.number("SELECT count(decrypt_col(c)) FROM t"), rows);
        } else {
            cold.refuse(OPEN, code);
            cold.refuse("SELECT rotate_key('pii')", code);
            assert_eq!(cold.number("SELECT count(*) FROM rekey.slots"), 1);
        }
        served.provide(&right);
        cold.run(reload);
        assert_eq!(
            cold.number("SELECT count(decrypt_col(c)) FROM t"),
            rows,
            "{outage} is over"
        );
    }
    assert!(!runs("sleep 7203"));
}
