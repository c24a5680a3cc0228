//! Root key files: made, adopted, missing, wrong, damaged, exchanged, read again.
//!
//! Nothing that is wrong with a root key file may stop a server or write anything; each fault is
//! found on use with F0000 that names the file, and `rekey.ready()` says so beforehand.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use postgres::Client;
use rekey_tests::cluster::is_root;
use rekey_tests::{Ask, Cluster, Options};

fn start() -> Cluster {
    Cluster::start(Options::preloaded())
}

fn shown(path: &Path) -> &str {
    path.to_str().expect("a path in UTF-8")
}

/// A cluster with a database `app`, a key, and one sealed row.
fn with_rows(options: Options) -> (Cluster, Client) {
    let cluster = Cluster::start(options);
    let mut client = cluster.database("app").connect();
    client.run(
        "SELECT rekey.create_key('pii');
         CREATE TABLE t AS SELECT encrypt_col('one', 'pii') AS c",
    );
    (cluster, client)
}

const OPEN: &str = "SELECT decrypt_col(c) FROM t";

/// Every use that needs a root key is F0000 naming what is wrong, and nothing is written.
fn refuses_everything(cluster: &Cluster, named: &str) {
    let mut client = cluster.connect("app");
    let before = client.rows("SELECT * FROM rekey.slots");
    assert!(!client.truth("SELECT rekey.ready()"));
    for sql in [
        OPEN,
        "SELECT encrypt_col('x', 'pii')",
        "CREATE TABLE lost AS SELECT encrypt_col('x', 'pii')",
        "SELECT rotate_key('pii')",
        "SELECT rekey.create_key('other')",
    ] {
        client.refuse(sql, "F0000").names(named);
    }
    assert!(!client.truth("SELECT rekey.can_open(c, '') FROM t"));
    assert_eq!(
        client.rows("SELECT * FROM rekey.slots"),
        before,
        "nothing is written"
    );
    assert_eq!(client.number("SELECT count(*) FROM rekey.keys"), 1);
    assert_eq!(client.number("SELECT 1"), 1, "other work goes on");
}

/// The one entry of a keyring with a single key, and its id.
fn entry(keyring: &str) -> (String, String) {
    let start = keyring.find("[").expect("a list") + 1;
    let end = keyring.rfind("]").expect("a list");
    let entry = keyring[start..end].trim().to_owned();
    let id = field(&entry, "id");
    (entry, id)
}

/// The text of a field, in a keyring with one key.
fn field(keyring: &str, name: &str) -> String {
    let label = format!("\"{name}\"");
    let after = &keyring[keyring.find(&label).expect("the field") + label.len()..];
    let text = after.split('"').nth(1).expect("its text");
    text.to_owned()
}

#[test]
fn init_makes_a_private_keyring_and_returns_its_id() {
    let cluster = start();
    cluster.empty_database("app", "");
    let (mut client, notices) = cluster.connect_noticing("app");
    client.run("CREATE EXTENSION pg_rekey");
    assert!(!client.truth("SELECT rekey.ready()"));
    let id = client.text("SELECT rekey.init_root_key()");
    assert!(client.truth("SELECT rekey.ready()"));
    let file = fs::metadata(cluster.root_key_file()).expect("the keyring");
    let data = fs::metadata(cluster.data()).expect("the data directory");
    assert_eq!(file.permissions().mode() & 0o777, 0o600);
    assert_eq!((file.uid(), file.gid()), (data.uid(), data.gid()));
    let keyring = fs::read_to_string(cluster.root_key_file()).expect("JSON");
    assert!(
        id.len() == 32
            && id
                .bytes()
                .all(|b| b.is_ascii_hexdigit() && !b.is_ascii_uppercase())
    );
    assert_eq!(field(&keyring, "id"), id);
    assert_eq!(field(&keyring, "key").len(), 64);
    assert_eq!(
        client.text("SELECT root_id FROM rekey.root_keys WHERE state = 'active'"),
        id
    );
    let said = notices.lock().expect("the notices").join("\n");
    assert!(
        said.contains("standby") && said.contains("escrow"),
        "{said}"
    );
    client.refuse("SELECT rekey.init_root_key()", "55000");
    assert_eq!(
        fs::read_to_string(cluster.root_key_file()).expect("JSON"),
        keyring
    );
}

#[test]
fn sealing_before_init_says_what_to_do() {
    let cluster = start();
    let mut client = cluster.empty_database("app", "").connect();
    client.run("CREATE EXTENSION pg_rekey");
    client
        .refuse("SELECT rekey.create_key('pii')", "F0000")
        .hints("init_root_key");
    client.refuse("SELECT encrypt_col('x', 'pii')", "42704");
    let without = Cluster::start(Options::preloaded().set("rekey.root_key_file = ''"));
    let mut client = without.empty_database("app", "").connect();
    client.run("CREATE EXTENSION pg_rekey");
    client
        .refuse("SELECT rekey.init_root_key()", "F0000")
        .names("rekey.root_key_file");
    assert!(!client.truth("SELECT rekey.ready()"));
}

#[test]
fn a_second_database_adopts_the_only_key() {
    let (cluster, mut client) = with_rows(Options::unloaded());
    let before = fs::read(cluster.root_key_file()).expect("the keyring");
    let id = client.text("SELECT root_id FROM rekey.root_keys");
    let mut second = cluster.empty_database("second", "").connect();
    second.run("CREATE EXTENSION pg_rekey");
    assert_eq!(second.text("SELECT rekey.init_root_key()"), id);
    assert_eq!(
        fs::read(cluster.root_key_file()).expect("the keyring"),
        before
    );
    second.run("SELECT rekey.create_key('pii')");
    let envelope = second.text("SELECT encrypt_col('two', 'pii')");
    assert_eq!(
        second.text(&format!("SELECT decrypt_col('{envelope}')")),
        "two"
    );
    client.refuse(&format!("SELECT decrypt_col('{envelope}')"), "42704");
}

#[test]
fn two_first_calls_at_once_agree_on_one_key() {
    let cluster = start();
    let names = ["one", "two", "three", "four"];
    for name in names {
        cluster
            .empty_database(name, "")
            .connect()
            .run("CREATE EXTENSION pg_rekey");
    }
    std::thread::scope(|scope| {
        for name in names {
            let mut client = cluster.connect(name);
            // A loser of the race may be told to try again; he must not adopt another key.
            scope.spawn(move || client.attempt("SELECT rekey.init_root_key()"));
        }
    });
    for name in names {
        let mut client = cluster.connect(name);
        if client.number("SELECT count(*) FROM rekey.root_keys") == 0 {
            client.run("SELECT rekey.init_root_key()");
        }
    }
    let keyring = fs::read_to_string(cluster.root_key_file()).expect("the keyring");
    for name in names {
        let mut client = cluster.connect(name);
        assert_eq!(
            client.text("SELECT root_id FROM rekey.root_keys"),
            field(&keyring, "id")
        );
        assert!(client.truth("SELECT rekey.ready()"));
    }
}

#[test]
fn a_place_that_base_backups_carry_is_refused() {
    let cluster = start();
    cluster
        .empty_database("app", "")
        .connect()
        .run("CREATE EXTENSION pg_rekey");
    let data = cluster.data();
    let space = cluster.dir().join("space");
    fs::create_dir(&space).expect("a folder");
    rekey_tests::cluster::give_to_server(&space);
    cluster.connect("app").run(&format!(
        "CREATE TABLESPACE space LOCATION '{}'",
        shown(&space)
    ));
    symlink(&data, cluster.dir().join("link")).expect("a link");
    let places: [PathBuf; 6] = [
        data.join("root.json"),
        data.join("base").join("root.json"),
        PathBuf::from("root.json"),
        cluster.dir().join("link").join("root.json"),
        cluster
            .dir()
            .join("data")
            .join("..")
            .join("data")
            .join("root.json"),
        space.join("root.json"),
    ];
    let mut client = cluster.connect("app");
    for place in places {
        cluster.append(&format!("rekey.root_key_file = '{}'", shown(&place)));
        cluster.reload(&mut client);
        let refusal = client
            .attempt("SELECT rekey.init_root_key()")
            .expect_err("a bad place");
        assert!(
            ["F0000", "22023", "55000"].contains(&refusal.code.as_str()),
            "{refusal:?}"
        );
        assert!(!refusal.hint.is_empty(), "{refusal:?}");
        let made = [
            data.join("root.json"),
            data.join("base/root.json"),
            space.join("root.json"),
        ];
        assert!(made.iter().all(|path| !path.exists()), "a file was made");
    }
}

#[test]
fn with_several_keys_init_asks_which() {
    let cluster = start();
    let (first, second) = (cluster.root_key_file(), cluster.dir().join("second.json"));
    let mut one = cluster.database("one").connect();
    one.run("SELECT rekey.create_key('pii'); CREATE TABLE t AS SELECT encrypt_col('one','pii') c");
    cluster.append(&format!("rekey.root_key_file = '{}'", shown(&second)));
    cluster.reload(&mut one);
    let mut two = cluster.database("two").connect();
    two.run("SELECT rekey.create_key('pii'); CREATE TABLE t AS SELECT encrypt_col('two','pii') c");
    let read = |path: &Path| fs::read_to_string(path).expect("a keyring");
    let ((entry_one, id_one), (entry_two, id_two)) = (entry(&read(&first)), entry(&read(&second)));
    assert_ne!(id_one, id_two);
    let both = format!("{{\"version\":1,\"keys\":[{entry_one},{entry_two}]}}");
    cluster.write_file(&second, both.as_bytes(), 0o600);
    cluster.restart("fast");
    for (database, value) in [("one", "one"), ("two", "two")] {
        assert_eq!(cluster.connect(database).text(OPEN), value);
        assert!(cluster.connect(database).truth("SELECT rekey.ready()"));
    }
    let mut three = cluster.empty_database("three", "").connect();
    three.run("CREATE EXTENSION pg_rekey");
    three
        .attempt("SELECT rekey.init_root_key()")
        .expect_err("which?")
        .names("init_root_key");
    three
        .attempt("SELECT rekey.init_root_key(repeat('0', 32))")
        .expect_err("an unknown id");
    three
        .attempt("SELECT rekey.init_root_key('nonsense')")
        .expect_err("not an id");
    assert_eq!(
        three.text(&format!("SELECT rekey.init_root_key('{id_two}')")),
        id_two
    );
    three.run("SELECT rekey.create_key('pii'); SELECT encrypt_col('x', 'pii')");
}

#[test]
fn a_missing_file_stops_no_server_and_writes_nothing() {
    for preload in [true, false] {
        let options = if preload {
            Options::preloaded()
        } else {
            Options::unloaded()
        };
        let (cluster, client) = with_rows(options);
        drop(client);
        let file = cluster.root_key_file();
        let keyring = fs::read(&file).expect("the keyring");
        fs::remove_file(&file).expect("the file removed");
        cluster.restart("fast");
        refuses_everything(&cluster, shown(&file));
        let log = cluster.log();
        let warned = log
            .lines()
            .any(|l| l.contains("WARNING") && l.contains(shown(&file)));
        assert!(
            warned || !preload,
            "no WARNING at start names the file: {log}"
        );
        let mut waiting = cluster.connect("app");
        waiting.refuse(OPEN, "F0000");
        cluster.write_file(&file, &keyring, 0o600);
        cluster.reload(&mut waiting);
        assert_eq!(
            waiting.text(OPEN),
            "one",
            "after a reload, without reconnecting"
        );
        assert!(waiting.truth("SELECT rekey.ready()"));
    }
}

#[test]
fn each_damage_to_the_file_is_found_and_named() {
    let (cluster, client) = with_rows(Options::preloaded());
    drop(client);
    let file = cluster.root_key_file();
    let good = fs::read_to_string(&file).expect("the keyring");
    let (one, id) = entry(&good);
    let key = field(&good, "key");
    let other_key = key.chars().rev().collect::<String>();
    let wrap = |keys: &str| format!("{{\"version\":1,\"keys\":[{keys}]}}");
    let damages: [(&str, String); 13] = [
        ("empty", String::new()),
        ("truncated", good[..good.len() / 2].to_owned()),
        ("garbage", "\u{1}\u{2}not JSON".to_owned()),
        ("another version", good.replacen('1', "2", 1)),
        ("the same id twice", wrap(&format!("{one},{one}"))),
        (
            "an unknown field",
            wrap(&one.replacen('{', "{\"note\":\"x\",", 1)),
        ),
        (
            "an unknown field outside",
            good.replacen('{', "{\"note\":\"x\",", 1),
        ),
        (
            "a field twice",
            wrap(&one.replacen('{', &format!("{{\"id\":\"{id}\","), 1)),
        ),
        ("a relabelled key", good.replace(&key, &other_key)),
        ("a short key", good.replace(&key, &key[..62])),
        (
            "a key that is no hex",
            good.replace(&key, &key.replace(|_| true, "z")),
        ),
        ("no keys at all", wrap("")),
        ("text after the end", format!("{good} x")),
    ];
    for (what, content) in damages {
        cluster.write_file(&file, content.as_bytes(), 0o600);
        let before = cluster.log().len();
        cluster.restart("fast");
        refuses_everything(&cluster, shown(&file));
        let log = cluster.log()[before..].to_owned();
        assert!(
            log.lines()
                .any(|l| l.contains("WARNING") && l.contains(shown(&file))),
            "{what}: no WARNING names the file: {log}"
        );
        assert!(
            !log.contains(&key) && !log.contains(&other_key),
            "{what}: a key in the log"
        );
    }
    cluster.write_file(&file, good.as_bytes(), 0o600);
    cluster.restart("fast");
    assert_eq!(cluster.connect("app").text(OPEN), "one");
}

#[test]
fn another_servers_keyring_is_told_from_the_right_one() {
    let (cluster, mut client) = with_rows(Options::unloaded());
    let file = cluster.root_key_file();
    let other = cluster.dir().join("other.json");
    cluster.append(&format!("rekey.root_key_file = '{}'", shown(&other)));
    cluster.reload(&mut client);
    cluster.database("other");
    let id = client.text("SELECT root_id FROM rekey.root_keys");
    refuses_everything(&cluster, &id);
    cluster.append(&format!("rekey.root_key_file = '{}'", shown(&file)));
    cluster.reload(&mut client);
    assert_eq!(cluster.connect("app").text(OPEN), "one");
}

#[test]
fn permissions_are_judged_as_those_of_a_tls_key() {
    let (cluster, mut client) = with_rows(Options::unloaded());
    let file = cluster.root_key_file();
    let keyring = fs::read(&file).expect("the keyring");
    for mode in [0o644, 0o604, 0o660, 0o640, 0o666] {
        cluster.write_file(&file, &keyring, mode);
        refuses_everything(&cluster, shown(&file));
    }
    for mode in [0o600, 0o400] {
        cluster.write_file(&file, &keyring, mode);
        assert_eq!(cluster.connect("app").text(OPEN), "one", "mode {mode:o}");
    }
    if is_root() {
        let group = fs::metadata(cluster.data())
            .expect("the data directory")
            .gid();
        std::os::unix::fs::chown(&file, Some(0), Some(group)).expect("a change of owner");
        for (mode, works) in [(0o640, true), (0o644, false), (0o660, false)] {
            fs::set_permissions(&file, fs::Permissions::from_mode(mode)).expect("a mode");
            assert_eq!(
                cluster.connect("app").truth("SELECT rekey.ready()"),
                works,
                "{mode:o}"
            );
        }
        rekey_tests::cluster::give_to_server(&file);
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).expect("a mode");
    }
    // Kubernetes serves secrets through links to links.
    let real = cluster.dir().join("real.json");
    fs::rename(&file, &real).expect("the file moved");
    symlink(&real, cluster.dir().join("middle.json")).expect("a link");
    symlink("middle.json", &file).expect("a link to a link");
    assert_eq!(cluster.connect("app").text(OPEN), "one");
    fs::remove_file(&file).expect("the link removed");
    fs::create_dir(&file).expect("a folder");
    refuses_everything(&cluster, shown(&file));
    assert_eq!(client.number("SELECT 1"), 1);
}

#[test]
fn a_warm_session_goes_on_without_the_file() {
    for options in [Options::preloaded(), Options::unloaded()] {
        let (cluster, mut client) = with_rows(options);
        assert_eq!(client.text(OPEN), "one");
        fs::remove_file(cluster.root_key_file()).expect("the file removed");
        cluster.reload(&mut client);
        assert_eq!(client.text(OPEN), "one");
        assert_eq!(
            client.text("SELECT decrypt_col(encrypt_col('x', 'pii'))"),
            "x"
        );
        cluster.connect("app").refuse(OPEN, "F0000");
    }
}

#[test]
fn reload_root_keys_reads_without_a_signal() {
    let (cluster, _client) = with_rows(Options::unloaded());
    let file = cluster.root_key_file();
    let keyring = fs::read(&file).expect("the keyring");
    fs::remove_file(&file).expect("the file removed");
    let mut client = cluster.connect("app");
    client.refuse(OPEN, "F0000");
    client
        .refuse("SELECT rekey.reload_root_keys()", "F0000")
        .names(shown(&file));
    cluster.write_file(&file, &keyring, 0o600);
    assert_eq!(client.number("SELECT rekey.reload_root_keys()"), 1);
    assert_eq!(client.text(OPEN), "one");
}

#[test]
fn an_unknown_root_id_makes_a_session_read_the_file_again() {
    let cluster = start();
    let (first, second) = (cluster.root_key_file(), cluster.dir().join("second.json"));
    let mut one = cluster.database("one").connect();
    one.run("SELECT rekey.create_key('pii')");
    cluster.append(&format!("rekey.root_key_file = '{}'", shown(&second)));
    cluster.reload(&mut one);
    let mut two = cluster.database("two").connect();
    two.run("SELECT rekey.create_key('pii'); CREATE TABLE t AS SELECT encrypt_col('two','pii') c");
    let read = |path: &Path| fs::read_to_string(path).expect("a keyring");
    let both = format!(
        "{{\"version\":1,\"keys\":[{},{}]}}",
        entry(&read(&first)).0,
        entry(&read(&second)).0
    );
    cluster.append(&format!("rekey.root_key_file = '{}'", shown(&first)));
    cluster.restart("fast");
    let mut session = cluster.connect("two");
    session.refuse(OPEN, "F0000");
    cluster.write_file(&first, both.as_bytes(), 0o600);
    assert_eq!(session.text(OPEN), "two", "no reload, no reconnection");
}

#[test]
fn init_that_is_rolled_back_or_refused_leaves_nothing_wrong() {
    let cluster = start();
    let mut client = cluster.empty_database("app", "").connect();
    client.run("CREATE EXTENSION pg_rekey");
    client.run("BEGIN READ ONLY");
    client.fail("SELECT rekey.init_root_key()", "25006");
    client.run("ROLLBACK");
    assert!(
        !cluster.root_key_file().exists(),
        "a read-only transaction made a file"
    );
    client.run("BEGIN");
    let id = client.text("SELECT rekey.init_root_key()");
    client.run("ROLLBACK");
    assert!(!client.truth("SELECT rekey.ready()"));
    client
        .refuse("SELECT rekey.create_key('pii')", "F0000")
        .hints("init_root_key");
    assert_eq!(
        client.text("SELECT rekey.init_root_key()"),
        id,
        "the same key is adopted"
    );
    client.run("SELECT rekey.create_key('pii')");
    let left: Vec<_> = fs::read_dir(cluster.dir())
        .expect("the folder")
        .flatten()
        .map(|entry| entry.file_name())
        .filter(|name| name.to_string_lossy().contains("json"))
        .collect();
    assert_eq!(left, ["root.json"], "no draft is left behind");
}

#[test]
fn after_a_reload_the_file_counts_and_not_what_the_postmaster_once_read() {
    let (cluster, client) = with_rows(Options::preloaded());
    drop(client);
    let file = cluster.root_key_file();
    let right = fs::read(&file).expect("the keyring");
    let elsewhere = start();
    elsewhere.database("other");
    let wrong = fs::read(elsewhere.root_key_file()).expect("another keyring");
    cluster.restart("fast");
    let mut admin = cluster.connect("app");
    let id = admin.text("SELECT root_id FROM rekey.root_keys");
    cluster.write_file(&file, &wrong, 0o600);
    assert_eq!(
        cluster.connect("app").text(OPEN),
        "one",
        "nobody has said reload yet"
    );
    cluster.reload(&mut admin);
    refuses_everything(&cluster, &id);
    cluster.write_file(&file, &right, 0o600);
    cluster.reload(&mut admin);
    assert_eq!(cluster.connect("app").text(OPEN), "one");
}
