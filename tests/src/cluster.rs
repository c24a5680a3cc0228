//! Throwaway servers: started from a copied template, stopped and deleted whatever happens.
//!
//! A cluster's folder holds `data`, `log`, the root key file and the socket. As root the server and
//! its tools run as the user `postgres`, otherwise as the caller. Each cluster has a reaper: a
//! shell that waits for the end of a pipe, kills the server and deletes the folder. It serves
//! `Drop`, statics (which are never dropped), panics and a killed test run alike.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use postgres::{Client, Config, NoTls};

use crate::{Ask, wait_until};

/// The port in the socket's name; sockets of different clusters lie in different folders.
const PORT: u16 = 5432;

/// The advisory lock for which a failpoint waits, in the database of whoever reaches it.
pub const GATE: i64 = 0x72_656b_6579;

/// The boundaries that the worker reaches between a rotation and the end of its slot, in their order.
pub const BOUNDARIES: [&str; 13] = [
    "step.begun",
    "pass.begun",
    "rows.updated",
    "batch.rewritten",
    "batch.advanced",
    "barrier.captured",
    "barrier.passed",
    "proof.begun",
    "proof.chunk",
    "proof.scanned",
    "slot.drained",
    "end.scanned",
    "slot.ended",
];

/// How each data directory is made.
const INITDB: [&str; 8] = [
    "-U",
    "postgres",
    "-A",
    "trust",
    "-E",
    "UTF8",
    "--locale=C.UTF-8",
    "--no-sync",
];

/// How a cluster differs from the usual one.
#[derive(Clone, Debug)]
pub struct Options {
    preload: bool,
    archives: bool,
    settings: Vec<String>,
    programs: PathBuf,
}

impl Options {
    /// With the library in shared_preload_libraries, as production servers run it.
    pub fn preloaded() -> Options {
        Options {
            preload: true,
            archives: false,
            settings: Vec::new(),
            programs: programs(),
        }
    }

    /// Without preload: each backend loads the library on first use.
    pub fn unloaded() -> Options {
        Options {
            preload: false,
            archives: false,
            settings: Vec::new(),
            programs: programs(),
        }
    }

    /// Adds a line to postgresql.conf.
    pub fn set(mut self, line: &str) -> Options {
        self.settings.push(line.to_owned());
        self
    }

    /// With an archive of its WAL, for [`Cluster::restore`].
    pub fn archiving(mut self) -> Options {
        self.archives = true;
        self
    }

    /// Of another PostgreSQL than REKEY_PG_BIN's: the folder of its programs.
    pub fn of(mut self, programs: &Path) -> Options {
        self.programs = programs.to_owned();
        self
    }
}

/// A running (or crashed, or stopped) server of its own.
#[derive(Debug)]
pub struct Cluster {
    dir: PathBuf,
    programs: PathBuf,
    reaper: Option<Child>,
    setup: Mutex<()>,
}

impl Cluster {
    /// Starts a server from the template.
    pub fn start(options: Options) -> Cluster {
        let template = template(&options.programs);
        let cluster = Cluster::in_new_folder(&options.programs);
        run(as_server("cp").arg("-a").arg(&template).arg(cluster.data()));
        cluster.configure(&options);
        cluster.boot();
        cluster
    }

    /// A streaming standby of this server, under the same root key file.
    pub fn standby(&self) -> Cluster {
        let standby = Cluster::in_new_folder(&self.programs);
        run(as_server(self.bin("pg_basebackup"))
            .args([
                "-R",
                "-X",
                "stream",
                "-c",
                "fast",
                "--no-sync",
                "-d",
                &self.conninfo("postgres"),
            ])
            .arg("-D")
            .arg(standby.data()));
        standby.append(&format!(
            "unix_socket_directories = '{}'",
            standby.dir.display()
        ));
        standby.boot();
        standby
    }

    /// Where a server with [`Options::archiving`] puts its WAL.
    pub fn archive(&self) -> PathBuf {
        self.dir.join("archive")
    }

    /// A base backup of this server, without WAL: that is in the archive.
    pub fn base_backup(&self, name: &str) -> PathBuf {
        let backup = self.dir.join(name);
        run(as_server(self.bin("pg_basebackup"))
            .args(["-X", "none", "-c", "fast", "--no-sync", "-d"])
            .arg(self.conninfo("postgres"))
            .arg("-D")
            .arg(&backup));
        backup
    }

    /// Names the present point in time, for `restore`, and waits until the archive has it.
    pub fn restore_point(&self, client: &mut Client, name: &str) {
        client.run(&format!("SELECT pg_create_restore_point('{name}')"));
        let file = client.text("SELECT pg_walfile_name(pg_switch_wal())");
        wait_until("the archive has the restore point", || {
            client
                .text("SELECT coalesce(max(last_archived_wal), '') FROM pg_stat_archiver")
                .get(..24)
                >= file.get(..24)
        });
    }

    /// Another server: this one's base backup, recovered to a restore point and promoted, under a
    /// copy of this one's root key file.
    pub fn restore(&self, backup: &Path, point: &str) -> Cluster {
        let restored = Cluster::in_new_folder(&self.programs);
        run(as_server("cp").arg("-a").arg(backup).arg(restored.data()));
        run(as_server("cp")
            .arg("-p")
            .args([self.root_key_file(), restored.root_key_file()]));
        restored.append(&format!(
            "unix_socket_directories = '{}'\nrekey.root_key_file = '{}'\narchive_mode = off\n\
             restore_command = 'cp {}/%f %p'\nrecovery_target_name = '{point}'\n\
             recovery_target_action = 'promote'",
            restored.dir.display(),
            restored.root_key_file().display(),
            self.archive().display()
        ));
        restored.write_file(&restored.data().join("recovery.signal"), b"", 0o600);
        restored.boot();
        let mut client = restored.connect("postgres");
        wait_until("the recovery has ended", || {
            !client.truth("SELECT pg_is_in_recovery()")
        });
        restored
    }

    /// Stops this server and has pg_upgrade make another of it, of the major version and the
    /// settings of `options`, under a copy of the root key file.
    pub fn upgrade(self, options: Options) -> Cluster {
        self.stop("fast");
        let new = Cluster::in_new_folder(&options.programs);
        fs::create_dir(new.data()).expect("the data directory");
        give_to_server(&new.data());
        // Checksums are on by default from 18 on, and both clusters must agree.
        let help = run(as_server(new.bin("initdb")).arg("--help"));
        let plain = String::from_utf8_lossy(&help.stdout).contains("--no-data-checksums");
        run(as_server(new.bin("initdb"))
            .args(INITDB)
            .args(plain.then_some("--no-data-checksums"))
            .arg("-D")
            .arg(new.data()));
        run(as_server("cp")
            .arg("-p")
            .args([self.root_key_file(), new.root_key_file()]));
        new.configure(&options);
        let mut upgrade = as_server(new.bin("pg_upgrade"));
        upgrade.current_dir(&new.dir).args(["-U", "postgres"]);
        upgrade.arg("-b").arg(&self.programs);
        upgrade.arg("-B").arg(&new.programs);
        upgrade.arg("-d").arg(self.data());
        upgrade.arg("-D").arg(new.data());
        upgrade.arg("-s").arg(&new.dir);
        let output = upgrade.output().expect("pg_upgrade");
        assert!(
            output.status.success(),
            "pg_upgrade: {}{}",
            String::from_utf8_lossy(&output.stdout),
            logs_below(&new.data().join("pg_upgrade_output.d"))
        );
        new.boot();
        new
    }

    /// The folder of the cluster; files put here go away with it.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The data directory.
    pub fn data(&self) -> PathBuf {
        self.dir.join("data")
    }

    /// Where `rekey.root_key_file` points, unless an option says otherwise.
    pub fn root_key_file(&self) -> PathBuf {
        self.dir.join("root.json")
    }

    /// Everything the server has logged so far.
    pub fn log(&self) -> String {
        let bytes = fs::read(self.dir.join("log")).expect("the server's log");
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// A connection string for PostgreSQL's own tools.
    pub fn conninfo(&self, database: &str) -> String {
        format!(
            "host={} port={PORT} user=postgres dbname={database}",
            self.dir.display()
        )
    }

    /// A superuser's session.
    pub fn connect(&self, database: &str) -> Client {
        self.connect_as(database, "postgres")
    }

    /// A session of `role`.
    pub fn connect_as(&self, database: &str, role: &str) -> Client {
        self.config(database, role)
            .connect(NoTls)
            .expect("a connection")
    }

    /// A session that can be tried: None while the server is not there.
    pub fn try_connect(&self, database: &str) -> Option<Client> {
        self.config(database, "postgres").connect(NoTls).ok()
    }

    /// A superuser's session and the NOTICEs and WARNINGs that it received.
    pub fn connect_noticing(&self, database: &str) -> (Client, Arc<Mutex<Vec<String>>>) {
        let notices = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&notices);
        let mut config = self.config(database, "postgres");
        config.notice_callback(move |notice| {
            let text = format!(
                "{}: {} {}",
                notice.severity(),
                notice.message(),
                notice.detail().unwrap_or_default()
            );
            sink.lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(text);
        });
        (config.connect(NoTls).expect("a connection"), notices)
    }

    /// Creates a database with the extension and a root key.
    pub fn database(&self, name: &str) -> Database<'_> {
        let database = self.empty_database(name, "");
        database.install();
        database
    }

    /// Creates a database without the extension; `options` goes to CREATE DATABASE.
    pub fn empty_database(&self, name: &str, options: &str) -> Database<'_> {
        self.connect("postgres").run(&format!(
            "CREATE DATABASE \"{name}\" TEMPLATE template0 {options}"
        ));
        Database {
            cluster: self,
            name: name.to_owned(),
        }
    }

    /// Adds a line to postgresql.conf; it counts from the next reload or start.
    pub fn append(&self, line: &str) {
        let mut conf = File::options()
            .append(true)
            .open(self.data().join("postgresql.conf"))
            .expect("postgresql.conf");
        writeln!(conf, "{line}").expect("a line in postgresql.conf");
    }

    /// Sends SIGHUP and waits until `client`'s backend has seen it.
    pub fn reload(&self, client: &mut Client) {
        let before = client.text("SELECT pg_conf_load_time()");
        client.run("SELECT pg_reload_conf()");
        wait_until("the configuration is reloaded", || {
            client.text("SELECT pg_conf_load_time()") != before
        });
    }

    /// Stops the server (mode `fast`, `smart` or `immediate`) and starts it again.
    pub fn restart(&self, mode: &str) {
        self.stop(mode);
        self.boot();
    }

    /// Stops the server.
    pub fn stop(&self, mode: &str) {
        run(self.pg_ctl().args(["stop", "-w", "-m", mode]));
    }

    /// Starts the server again after `stop` or `kill`.
    pub fn boot(&self) {
        let output = self.try_boot();
        assert!(
            output.status.success(),
            "the server did not start: {}",
            self.log()
        );
    }

    /// Tries to start the server.
    pub fn try_boot(&self) -> Output {
        let log = self.dir.join("log");
        let mut command = self.pg_ctl();
        command.args(["start", "-w", "-l"]).arg(log);
        // Not output(): the server would keep the pipe open.
        let status = command.stdout(Stdio::null()).stderr(Stdio::null()).status();
        Output {
            status: status.expect("pg_ctl"),
            stdout: Vec::new(),
            stderr: Vec::new(),
        }
    }

    /// Starts the server in the place of process 1 of a container: its orphans become its children.
    pub fn boot_as_process_one(&self) {
        let script = format!(
            "#!/usr/bin/env python3\nimport ctypes, os, sys\n\
             ctypes.CDLL(None).prctl(36, 1, 0, 0, 0) # PR_SET_CHILD_SUBREAPER\n\
             os.execv('{0}', ['{0}'] + sys.argv[1:])\n",
            self.bin("postgres").display()
        );
        let first = self.dir.join("process-one");
        self.write_file(&first, script.as_bytes(), 0o700);
        let mut command = self.pg_ctl();
        command
            .args(["start", "-w", "-l"])
            .arg(self.dir.join("log"));
        command.arg("-p").arg(first);
        command.env("PATH", "/usr/local/bin:/usr/bin:/bin");
        let status = command.stdout(Stdio::null()).stderr(Stdio::null()).status();
        assert!(status.expect("pg_ctl").success(), "{}", self.log());
    }

    /// Makes a standby a primary.
    pub fn promote(&self) {
        run(self.pg_ctl().args(["promote", "-w"]));
    }

    /// kill -9 of the postmaster; returns when all its processes are gone.
    pub fn kill(&self) {
        let pid_file = fs::read_to_string(self.data().join("postmaster.pid")).expect("a pid file");
        let pid = pid_file
            .lines()
            .next()
            .expect("the postmaster's pid")
            .to_owned();
        let children = children_of(&pid);
        signal("KILL", &pid);
        wait_until("the server's processes are gone", || {
            children
                .iter()
                .chain([&pid])
                .all(|child| !Path::new("/proc").join(child).join("exe").exists())
        });
        // Where nobody reaps orphans, the zombie's number would pass for a live postmaster.
        fs::remove_file(self.data().join("postmaster.pid")).expect("the pid file removed");
        fs::remove_file(self.dir.join(format!(".s.PGSQL.{PORT}.lock"))).expect("its lock");
    }

    /// kill -9 of one backend; the postmaster restarts everything.
    pub fn kill_backend(&self, pid: i64) {
        signal("KILL", &pid.to_string());
    }

    /// Has the next process that reaches a boundary of the engine `kill` itself, fail by an `error`
    /// or `wait` for [`GATE`], once (src/failpoint.rs, debug builds).
    pub fn arm(&self, boundary: &str, action: &str) {
        let draft = self.data().join("rekey.failpoint.draft");
        self.write_file(&draft, format!("{boundary} {action}").as_bytes(), 0o600);
        fs::rename(draft, self.failpoint()).expect("an armed failpoint");
    }

    /// Whether nobody has reached what was armed.
    pub fn is_armed(&self) -> bool {
        self.failpoint().exists()
    }

    /// Takes back what was armed; false when somebody has reached it.
    pub fn disarm(&self) -> bool {
        fs::remove_file(self.failpoint()).is_ok()
    }

    fn failpoint(&self) -> PathBuf {
        self.data().join("rekey.failpoint")
    }

    /// Runs one of PostgreSQL's client programs against this cluster; its output, whatever its end.
    pub fn try_tool(&self, program: &str, args: &[&str], options: &str) -> Output {
        let mut command = as_server(self.bin(program));
        command
            .args(args)
            .env("PGHOST", &self.dir)
            .env("PGPORT", PORT.to_string())
            .env("PGUSER", "postgres")
            .env("PGOPTIONS", options);
        command
            .output()
            .unwrap_or_else(|error| panic!("{program}: {error}"))
    }

    /// Runs one of PostgreSQL's client programs, which must succeed, and returns what it printed.
    pub fn tool(&self, program: &str, args: &[&str]) -> String {
        let output = self.try_tool(program, args, "");
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{program} {args:?}: {errors}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Writes a file that the server's user owns, with these permissions.
    pub fn write_file(&self, path: &Path, content: &[u8], mode: u32) {
        fs::write(path, content).expect("a file for the server");
        give_to_server(path);
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("its permissions");
    }

    fn config(&self, database: &str, role: &str) -> Config {
        let mut config = Config::new();
        config
            .host_path(&self.dir)
            .port(PORT)
            .user(role)
            .dbname(database);
        config
    }

    fn pg_ctl(&self) -> Command {
        let mut command = as_server(self.bin("pg_ctl"));
        command.arg("-D").arg(self.data()).args(["-t", "60"]);
        command
    }

    fn bin(&self, program: &str) -> PathBuf {
        self.programs.join(program)
    }

    fn in_new_folder(programs: &Path) -> Cluster {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let dir = work().join(format!("{}-{number}", std::process::id()));
        assert!(
            dir.as_os_str().len() < 85,
            "{dir:?} is too long for a socket: set REKEY_WORK"
        );
        fs::create_dir(&dir).expect("the cluster's folder");
        give_to_server(&dir);
        let reaper = reaper(&dir);
        Cluster {
            dir,
            programs: programs.to_owned(),
            reaper: Some(reaper),
            setup: Mutex::new(()),
        }
    }

    fn configure(&self, options: &Options) {
        let dir = self.dir.display();
        self.append(&format!(
            "port = {PORT}\nlisten_addresses = ''\nunix_socket_directories = '{dir}'\n\
             rekey.root_key_file = '{}'\n\
             fsync = off\nfull_page_writes = off\nshared_buffers = 32MB\nmax_connections = 100\n\
             max_prepared_transactions = 20\nmax_wal_size = 2GB\nwal_level = replica\n\
             lock_timeout = '90s'\ntimezone = 'UTC'\nlc_messages = 'C'\nlog_timezone = 'UTC'\n\
             log_line_prefix = '%m [%p] %q%u@%d '",
            self.root_key_file().display()
        ));
        if options.preload {
            self.append("shared_preload_libraries = 'pg_rekey'");
        }
        if options.archives {
            fs::create_dir(self.archive()).expect("the archive's folder");
            give_to_server(&self.archive());
            self.append(&format!(
                "archive_mode = on\narchive_command = 'cp %p {}/%f'",
                self.archive().display()
            ));
        }
        for line in &options.settings {
            self.append(line);
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = fs::read_to_string(self.dir.join("log")).unwrap_or_default();
            let lines: Vec<&str> = log.lines().collect();
            let last = lines.len().saturating_sub(30);
            eprintln!("the server's log ends:\n{}", lines[last..].join("\n"));
        }
        if let Some(mut reaper) = self.reaper.take() {
            drop(reaper.stdin.take());
            let _ = reaper.wait();
        }
    }
}

/// A copy of the private PostgreSQL tree (scripts/prefix.sh) that REKEY_PG_BIN lies in, for tests
/// that add files to an installation. Deleted when dropped.
#[derive(Debug)]
pub struct Tree {
    dir: PathBuf,
    programs: PathBuf,
    extensions: PathBuf,
}

impl Tree {
    /// Copies the tree. Links to the system's files stay links.
    pub fn copy() -> Tree {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let programs = programs();
        let root = programs
            .ancestors()
            .find(|folder| folder.join(".stamp").exists())
            .unwrap_or_else(|| panic!("{programs:?} is in no tree of scripts/prefix.sh"));
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let dir = work().join(format!("tree-{}-{number}", std::process::id()));
        run(Command::new("cp").arg("-a").arg(root).arg(&dir));
        let inside = programs.strip_prefix(root).expect("a folder of the tree");
        let programs = dir.join(inside);
        let share = run(Command::new(programs.join("pg_config")).arg("--sharedir"));
        let share = String::from_utf8(share.stdout).expect("a path in UTF-8");
        let extensions = Path::new(share.trim_end()).join("extension");
        assert!(extensions.starts_with(&dir), "{extensions:?} is no copy");
        Tree {
            dir,
            programs,
            extensions,
        }
    }

    /// The folder of its programs, for [`Options::of`].
    pub fn programs(&self) -> &Path {
        &self.programs
    }

    /// A file of its folder of extensions.
    pub fn read(&self, name: &str) -> String {
        fs::read_to_string(self.extensions.join(name)).expect("a file of an extension")
    }

    /// Writes a file of its folder of extensions.
    pub fn write(&self, name: &str, content: &str) {
        fs::write(self.extensions.join(name), content).expect("a file of an extension");
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// A database of a test's own.
#[derive(Debug)]
pub struct Database<'a> {
    /// The server that it lives in.
    pub cluster: &'a Cluster,
    /// Its name; roles of a test begin with it, since roles are shared by all databases.
    pub name: String,
}

impl Database<'_> {
    /// Creates the extension and its root key, or adopts that of the cluster.
    pub fn install(&self) {
        // Two first calls of init_root_key at once are a test of their own.
        let _one = self
            .cluster
            .setup
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        self.connect()
            .run("CREATE EXTENSION pg_rekey; SELECT rekey.init_root_key()");
    }

    /// A superuser's session.
    pub fn connect(&self) -> Client {
        self.cluster.connect(&self.name)
    }

    /// A session of `role`.
    pub fn connect_as(&self, role: &str) -> Client {
        self.cluster.connect_as(&self.name, role)
    }

    /// Creates a login role and returns its name: the database's, an underscore, and `suffix`.
    pub fn role(&self, suffix: &str) -> String {
        let role = format!("{}_{suffix}", self.name);
        self.connect().run(&format!("CREATE ROLE \"{role}\" LOGIN"));
        role
    }
}

/// The folder of PostgreSQL's programs.
pub fn programs() -> PathBuf {
    std::env::var_os("REKEY_PG_BIN").map_or_else(
        || PathBuf::from("/usr/lib/postgresql/15/bin"),
        PathBuf::from,
    )
}

/// The path of one of PostgreSQL's programs.
pub fn bin(program: &str) -> PathBuf {
    programs().join(program)
}

/// Runs a command that must succeed.
pub fn run(command: &mut Command) -> Output {
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {errors}");
    output
}

/// A command that runs as the user who owns the servers.
pub fn as_server(program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new(program);
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy().into_owned();
        if text.starts_with("PG") || text.starts_with("LC_") || text == "RUST_BACKTRACE" {
            command.env_remove(&name);
        }
    }
    command
        .env("LC_ALL", "C")
        .current_dir("/")
        .stdin(Stdio::null());
    if let Some((user, group)) = server_ids() {
        command.uid(user).gid(group).env("HOME", "/");
    }
    command
}

/// Gives a file or folder to the user who owns the servers.
pub fn give_to_server(path: &Path) {
    if let Some((user, group)) = server_ids() {
        std::os::unix::fs::chown(path, Some(user), Some(group)).expect("a change of owner");
    }
}

/// Whether the tests run as root.
pub fn is_root() -> bool {
    fs::metadata("/proc/self").expect("/proc").uid() == 0
}

/// The ids of `postgres` when the tests run as root, since a server refuses to.
fn server_ids() -> Option<(u32, u32)> {
    if !is_root() {
        return None;
    }
    let users = fs::read_to_string("/etc/passwd").expect("/etc/passwd");
    let line = users.lines().find(|line| line.starts_with("postgres:"));
    let fields: Vec<&str> = line.expect("the user postgres").split(':').collect();
    Some((
        fields[2].parse().expect("a uid"),
        fields[3].parse().expect("a gid"),
    ))
}

/// Whether a process whose command line contains `word` runs.
pub fn runs(word: &str) -> bool {
    let processes = fs::read_dir("/proc").expect("/proc");
    processes
        .flatten()
        .filter_map(|process| fs::read(process.path().join("cmdline")).ok())
        .any(|line| {
            String::from_utf8_lossy(&line)
                .replace('\0', " ")
                .contains(word)
        })
}

/// The processes whose parent is `pid`.
fn children_of(pid: &str) -> Vec<String> {
    let parent = format!("PPid:\t{pid}");
    let processes = fs::read_dir("/proc").expect("/proc");
    processes
        .flatten()
        .filter(|process| {
            fs::read_to_string(process.path().join("status"))
                .is_ok_and(|status| status.lines().any(|line| line == parent))
        })
        .map(|process| process.file_name().to_string_lossy().into_owned())
        .collect()
}

/// Sends a signal to a process.
pub fn signal(name: &str, pid: &str) {
    // The shell's own kill: a small system has no other.
    run(Command::new("sh").args(["-c", "kill -s \"$0\" \"$1\"", name, pid]));
}

/// The folder of all test clusters.
fn work() -> PathBuf {
    let base = std::env::var_os("REKEY_WORK").map_or_else(
        || {
            let user = run(Command::new("id").arg("-un"));
            let user = String::from_utf8_lossy(&user.stdout).trim().to_owned();
            PathBuf::from(format!("/var/tmp/pg_rekey-{user}"))
        },
        PathBuf::from,
    );
    let dir = base.join("tests");
    fs::create_dir_all(&dir).expect("the work folder");
    dir
}

/// A data directory fresh from initdb, made once per version of PostgreSQL and then copied.
fn template(programs: &Path) -> PathBuf {
    let version = run(Command::new(programs.join("postgres")).arg("--version"));
    let version = String::from_utf8_lossy(&version.stdout).into_owned();
    let version: String = version
        .chars()
        .filter(|c| c.is_ascii_digit() || *c == '.')
        .collect();
    let lock = File::create(work().join("template.lock")).expect("a lock file");
    lock.lock().expect("the template's lock");
    let dir = work().join(format!("template-{version}"));
    if !dir.exists() {
        let fresh = work().join("template-new");
        let _ = fs::remove_dir_all(&fresh);
        fs::create_dir(&fresh).expect("the template's folder");
        give_to_server(&fresh);
        run(as_server(programs.join("initdb"))
            .args(INITDB)
            .arg("-D")
            .arg(&fresh));
        fs::rename(&fresh, &dir).expect("the template in place");
    }
    dir
}

/// All text below a folder in which a program left its logs.
fn logs_below(dir: &Path) -> String {
    let mut text = String::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.path().is_dir() {
            text += &logs_below(&entry.path());
        } else if entry
            .path()
            .extension()
            .is_some_and(|end| end == "log" || end == "txt")
        {
            let bytes = fs::read(entry.path()).unwrap_or_default();
            text += &format!(
                "\n== {}\n{}",
                entry.path().display(),
                String::from_utf8_lossy(&bytes)
            );
        }
    }
    text
}

/// Waits for the end of its input, then kills the server and deletes its folder.
fn reaper(dir: &Path) -> Child {
    const SCRIPT: &str = r#"
        read -r _
        pid=$(head -n 1 "$0/data/postmaster.pid" 2>/dev/null)
        if [ -n "$pid" ]; then
            kill -QUIT "$pid" 2>/dev/null
            while [ -e "/proc/$pid/exe" ]; do sleep 0.05; done
        fi
        [ "$1" = keep ] || rm -rf "$0""#;
    let keep = if std::env::var_os("REKEY_KEEP").is_some() {
        "keep"
    } else {
        "delete"
    };
    Command::new("sh")
        .args(["-c", SCRIPT])
        .arg(dir)
        .arg(keep)
        .process_group(0)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("a shell")
}
