//! examples/root-key/kubernetes.md without a cluster: a mounted Secret as the kubelet lays it out
//! and exchanges it, the modes that it gives, and the page's YAML.
//!
//! The kubelet's part is that of its AtomicWriter (pkg/volume/util/atomic_writer.go of Kubernetes):
//! files are links to `..data/NAME`, `..data` is a link to a folder named by the time, and a new
//! version takes its place by a rename. As root the files belong to root and the server's group, as
//! with `fsGroup`; anyone else can only make files of his own, and some of it is not tried.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown, symlink};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use rekey_tests::cluster::is_root;
use rekey_tests::provider::{example, fetched, one_key_more};
use rekey_tests::{Ask, Cluster, Options, bytes, wait_until};

const OPEN: &str = "SELECT decrypt_col(c) FROM t ORDER BY 1";

/// A mounted Secret with the file `root.json`.
struct Mount {
    folder: PathBuf,
    group: u32,
    versions: usize,
}

impl Mount {
    /// Beside a server, which reads its root keys from there from its next start on.
    fn beside(cluster: &Cluster) -> Mount {
        let folder = cluster.dir().join("mount");
        fs::create_dir(&folder).expect("the mount");
        let mount = Mount {
            folder,
            group: fs::metadata(cluster.data()).expect("the data").gid(),
            versions: 0,
        };
        cluster.append(&format!("rekey.root_key_file = '{}'", mount.file()));
        mount
    }

    fn file(&self) -> String {
        self.folder.join("root.json").display().to_string()
    }

    /// As the page has it: defaultMode 0440 and an fsGroup.
    fn publish(&mut self, keyring: &[u8]) {
        let mode = if is_root() { 0o440 } else { 0o400 };
        self.publish_as(keyring, mode, self.group);
    }

    fn publish_as(&mut self, keyring: &[u8], mode: u32, group: u32) {
        let before = fs::read_link(self.folder.join("..data"));
        self.versions += 1;
        let version = format!("..2026_11_26_12_00_{:02}.1", self.versions);
        let folder = self.folder.join(&version);
        fs::create_dir(&folder).expect("a version");
        fs::write(folder.join("root.json"), keyring).expect("the keyring");
        if is_root() {
            chown(folder.join("root.json"), Some(0), Some(group)).expect("an owner");
        }
        fs::set_permissions(folder.join("root.json"), fs::Permissions::from_mode(mode))
            .expect("a mode");
        let draft = self.folder.join("..data_tmp");
        symlink(&version, &draft).expect("a link");
        fs::rename(&draft, self.folder.join("..data")).expect("the new version in place");
        match before {
            Ok(old) => fs::remove_dir_all(self.folder.join(old)).expect("the old version removed"),
            Err(_) => symlink("..data/root.json", self.file()).expect("a link"),
        }
    }

    /// Everything in it, and when it changed.
    fn listing(&self) -> String {
        let mut find = Command::new("find");
        let output = find.arg(&self.folder).args(["-printf", "%p %l %s %T@\n"]);
        let output = output.output().expect("find");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }
}

fn new_keyring() -> Vec<u8> {
    let output = Command::new(example("new-key.sh")).output();
    output.expect("a keyring").stdout
}

/// The id of a keyring's only key.
fn id_of(keyring: &[u8]) -> String {
    let text = String::from_utf8_lossy(keyring);
    text.split('"').nth(7).expect("an id").to_owned()
}

/// A server on a mounted Secret, with a sealed row.
fn mounted() -> (Cluster, Mount) {
    let cluster = Cluster::start(Options::preloaded());
    let mut mount = Mount::beside(&cluster);
    let keyring = new_keyring();
    mount.publish(&keyring);
    cluster.restart("fast");
    let mut client = cluster.empty_database("app", "").connect();
    client.run("CREATE EXTENSION pg_rekey");
    let listing = mount.listing();
    let adopted = client.text("SELECT rekey.init_root_key()");
    assert_eq!(adopted, id_of(&keyring));
    assert_eq!(mount.listing(), listing, "nothing is written there");
    client.run(
        "SELECT rekey.create_key('pii');
         CREATE TABLE t AS SELECT encrypt_col('one', 'pii') AS c",
    );
    (cluster, mount)
}

#[test]
fn a_mounted_secret_is_adopted_and_a_rotation_there_names_the_key() {
    let (cluster, mount) = mounted();
    if !is_root() {
        eprintln!("skipped: only a mount of root's is read-only for the server");
        return;
    }
    let listing = mount.listing();
    cluster
        .connect("app")
        .refuse("SELECT rekey.rotate_root_key()", "F0000")
        .hints("rotate_root_key(root_id)");
    assert_eq!(mount.listing(), listing);
}

#[test]
fn an_exchanged_secret_is_read_by_the_primary_and_its_replicas_without_a_reload() {
    let (cluster, mut mount) = mounted();
    let standby = cluster.standby();
    let (mut primary, mut replica) = (cluster.connect("app"), standby.connect("app"));
    let mut warm = cluster.connect("app");
    for client in [&mut primary, &mut replica, &mut warm] {
        assert_eq!(client.text(OPEN), "one");
    }
    let keyring = fs::read(mount.file()).expect("the keyring");
    let old = id_of(&keyring);
    let copy = cluster.dir().join("copy.json");
    cluster.write_file(&copy, &keyring, 0o600);
    let (more, new) = one_key_more(&copy);
    let rotate = format!("SELECT rekey.rotate_root_key('{new}')");
    primary.refuse(&rotate, "F0000").names(&new);
    mount.publish(&more);
    primary.run(&rotate);
    primary.run("SELECT rotate_key('pii'); INSERT INTO t VALUES (encrypt_col('two', 'pii'))");
    primary.run(&format!("SELECT rekey.retire_root_key('{old}')"));
    let lsn = primary.text("SELECT pg_current_wal_lsn()");
    wait_until("the standby has replayed it", || {
        replica.truth(&format!("SELECT pg_last_wal_replay_lsn() >= '{lsn}'"))
    });
    // What is left is wrapped under the new key alone; nobody was told to read the file.
    for client in [&mut warm, &mut replica, &mut cluster.connect("app")] {
        assert_eq!(client.column(OPEN), ["one", "two"]);
    }
    assert_eq!(standby.connect("app").column(OPEN), ["one", "two"]);
}

#[test]
fn the_modes_that_a_kubelet_gives_are_judged_as_the_page_says() {
    if !is_root() {
        eprintln!("skipped: files of root's need root");
        return;
    }
    let (cluster, mut mount) = mounted();
    let keyring = fs::read(mount.file()).expect("the keyring");
    let group = mount.group;
    cluster.append("shared_preload_libraries = ''");
    cluster.restart("fast");
    // fsGroup adds 0440 to what defaultMode says.
    for (mode, group, accepted) in [
        (0o440, group, true),
        (0o640, group, true),
        (0o644, group, false),
        (0o444, group, false),
        (0o460, group, false),
        (0o440, 0, false),
        (0o400, 0, false),
    ] {
        mount.publish_as(&keyring, mode, group);
        let mut client = cluster.connect("app");
        if accepted {
            assert_eq!(client.text(OPEN), "one", "{mode:o} {group}");
        } else {
            let named = if group == 0 { "denied" } else { "has mode" };
            client
                .refuse(OPEN, "F0000")
                .names(&mount.file())
                .names(named);
        }
    }
}

/// The page's blocks of YAML: a Pod's spec and a Cluster of CloudNativePG.
fn yaml_of_the_page() -> [String; 2] {
    let page = page();
    let is_yaml =
        |block: &&str| block.starts_with("    spec:") || block.starts_with("    apiVersion:");
    let blocks: Vec<String> = page
        .split("\n\n")
        .filter(is_yaml)
        .map(str::to_owned)
        .collect();
    blocks.try_into().expect("two blocks of YAML")
}

fn page() -> String {
    fs::read_to_string(example("kubernetes.md")).expect("the page")
}

/// What a command that must succeed prints as JSON.
fn json(command: &mut Command, input: &[u8]) -> serde_json::Value {
    let piped = command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = piped.spawn().expect("a program");
    let mut stdin = child.stdin.take().expect("its input");
    stdin.write_all(input).expect("its input");
    drop(stdin);
    let output = child.wait_with_output().expect("its output");
    assert!(output.status.success(), "{command:?}");
    serde_json::from_slice(&output.stdout).expect("JSON")
}

#[test]
fn kubectl_makes_the_pages_secret_and_reads_its_pod() {
    let Some([kubectl]) = fetched("kubectl's reading of kubernetes.md", ["bin/kubectl"]) else {
        return;
    };
    let page = page();
    let line = page
        .lines()
        .find(|line| line.contains("kubectl create secret"));
    let line = line.expect("how the Secret is made").trim();
    let make = line.replace("kubectl", &kubectl.display().to_string());
    let mut shell = Command::new("sh");
    shell
        .current_dir(example(""))
        .env("KUBECONFIG", "/dev/null");
    let secret = json(
        shell.args(["-c", &format!("{make} --dry-run=client -o json")]),
        b"",
    );
    let keyring = secret["data"]["root.json"].as_str().expect("a keyring");
    assert!(keyring.starts_with(&bytes::base64(b"{\"version\":1")));

    let [pod, _] = yaml_of_the_page();
    let pod = pod.replace("name: postgres", "name: postgres\n          image: old");
    let pod = format!("    apiVersion: v1\n    kind: Pod\n    metadata: {{name: a}}\n{pod}");
    let mut set = Command::new(kubectl);
    set.env("KUBECONFIG", "/dev/null");
    set.args([
        "set",
        "image",
        "--local",
        "-f",
        "-",
        "postgres=new",
        "-o",
        "json",
    ]);
    let read = json(&mut set, pod.as_bytes());
    let volume = &read["spec"]["volumes"][0];
    assert_eq!(volume["secret"]["secretName"], secret["metadata"]["name"]);
    // A number in octal to kubectl, too.
    assert_eq!(volume["secret"]["defaultMode"], 0o440);
    let mount = &read["spec"]["containers"][0]["volumeMounts"][0];
    assert_eq!(mount["name"], volume["name"]);
    assert_eq!(mount["readOnly"], true);
    assert_eq!(read["spec"]["securityContext"]["fsGroup"], 999);
}

#[test]
fn the_yaml_of_the_page_parses_agrees_with_itself_and_sets_a_database_up() {
    let Some([python]) = fetched("the YAML of kubernetes.md", ["bin/python"]) else {
        return;
    };
    let script = "import json, sys, yaml; json.dump(yaml.safe_load(sys.stdin), sys.stdout)";
    let [pod, cnpg] = yaml_of_the_page()
        .map(|block| json(Command::new(&python).args(["-c", script]), block.as_bytes()));
    let spec = &pod["spec"];
    let volume = &spec["volumes"][0];
    let mount = &spec["containers"][0]["volumeMounts"][0];
    assert_eq!(volume["secret"]["defaultMode"], 0o440);
    assert!(spec["securityContext"]["fsGroup"].is_number());
    assert_eq!(volume["name"], mount["name"]);
    assert_eq!(mount["readOnly"], true);
    let page = page();
    let text = |value: &serde_json::Value| value.as_str().expect("a text").to_owned();
    let secret = text(&volume["secret"]["secretName"]);
    assert!(page.contains(&format!("secret generic {secret} --from-file=root.json=")));
    let file = format!("{}/root.json", text(&mount["mountPath"]));
    assert!(page.contains(&format!("rekey.root_key_file = '{file}'")));

    let spec = &cnpg["spec"];
    assert_eq!(cnpg["apiVersion"], "postgresql.cnpg.io/v1");
    let template = &spec["projectedVolumeTemplate"];
    assert_eq!(template["defaultMode"], 0o440);
    let source = &template["sources"][0]["secret"];
    assert_eq!(source["name"], secret.as_str());
    assert_eq!(source["items"][0]["key"], "root.json");
    let settings = &spec["postgresql"];
    assert_eq!(settings["shared_preload_libraries"][0], "pg_rekey");
    let file = format!("/projected/{}", text(&source["items"][0]["path"]));
    assert_eq!(settings["parameters"]["rekey.root_key_file"], file.as_str());
    let (cluster, _mount) = mounted();
    let mut client = cluster.empty_database("shop", "").connect();
    let sql = &spec["bootstrap"]["initdb"]["postInitApplicationSQL"];
    for statement in sql.as_array().expect("statements") {
        client.run(&text(statement));
    }
    assert!(client.truth("SELECT rekey.ready()"));
}
