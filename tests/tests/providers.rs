//! The scripts of examples/root-key/ for HSMs, the clouds' key management services and systemd.
//!
//! `make test-providers` fetches what they need: SoftHSM, and moto, which imitates AWS. Google's
//! service has no emulator: tests/providers/gcp_kms.py stands in for it. A test without its
//! programs prints that it was skipped. OpenBao has a file of its own, `openbao.rs`.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use rekey_tests::Ask;
use rekey_tests::cluster::{give_to_server, run};
use rekey_tests::provider::{OPEN, Served, Service, fetched, free_ports, one_key_more, secret_of};

/// What the shell that runs an example has before its own PATH.
fn path_with(program: &Path) -> String {
    let folder = program.parent().expect("a folder");
    format!("PATH={}:$PATH", folder.display())
}

fn is_served(port: u16) -> bool {
    std::net::TcpStream::connect(("127.0.0.1", port)).is_ok()
}

/// No key of the keyring, nor another secret, is in the server's log.
fn no_secret_is_logged(served: &Served, more: &[&str]) {
    let key = secret_of(&fs::read(&served.keyring).expect("the keyring"));
    let log = served.cluster.log();
    for secret in more.iter().copied().chain([key.as_str()]) {
        assert!(!log.contains(secret), "a secret is in the log");
    }
}

#[test]
fn a_token_gives_the_keyring_under_its_pin_only_and_rotates() {
    let files = ["bin/softhsm2-util", "bin/pkcs11-tool", "lib/libsofthsm2.so"];
    let Some([util, tool, module]) = fetched("pkcs11.sh", files) else {
        return;
    };
    let served = Served::start();
    let tokens = served.cluster.dir().join("tokens");
    fs::create_dir(&tokens).expect("a folder of tokens");
    give_to_server(&tokens);
    let conf = served.private(
        "softhsm.conf",
        format!("directories.tokendir = {}\n", tokens.display()),
    );
    let pin = "a-pin-of-a-test";
    let on_token = |program: &PathBuf, args: &[&str]| {
        let mut command = served.program(program);
        command.env("SOFTHSM2_CONF", &conf).env("PKCS11_PIN", pin);
        run(command.arg("--module").arg(&module).args(args));
    };
    let init = ["--init-token", "--free", "--label", "pg_rekey"];
    let pins = ["--so-pin", "another-pin", "--pin", pin];
    on_token(&util, &[init, pins].concat());
    // As the head of the script says.
    let login = [
        "--token-label",
        "pg_rekey",
        "--login",
        "--pin",
        "env:PKCS11_PIN",
    ];
    let object = ["--type", "data", "--label", "pg_rekey"];
    let write = |keyring: &str| {
        let write = ["--private", "--write-object", keyring];
        on_token(&tool, &[&login[..], &object, &write].concat());
    };
    let delete = || on_token(&tool, &[&login[..], &object, &["--delete-object"]].concat());
    write(&served.keyring.display().to_string());
    let pin_file = served.private("pin", pin);
    let module_path = module.display();
    served.use_example(
        "pkcs11.sh",
        &format!(
            "{} SOFTHSM2_CONF={conf} PKCS11_PIN_FILE={pin_file} PKCS11_MODULE={module_path}",
            path_with(&tool)
        ),
    );
    served.cluster.restart("fast");
    let mut warm = served.connect();
    assert_eq!(warm.text(OPEN), "one");

    served.private("pin", "a-wrong-one");
    served.outlives(&mut warm, ("58000", "status 1"), || {
        served.private("pin", pin);
    });
    let away = served.cluster.dir().join("drawer");
    fs::rename(&tokens, &away).expect("the token pulled out");
    served.outlives(&mut warm, ("58000", "status 1"), || {
        fs::rename(&away, &tokens).expect("the token put in");
    });
    delete();
    served.outlives(&mut warm, ("58000", "status 1"), || {
        write(&served.keyring.display().to_string());
    });

    let (more, new) = one_key_more(&served.keyring);
    delete();
    write(&served.private("more.json", more));
    served.rotates_to(&new);
    let log = served.cluster.log();
    assert!(log.contains("CKR_PIN_INCORRECT"), "{log}");
    no_secret_is_logged(&served, &[pin]);
}

/// moto with a key as `alias/pg_rekey`, and the AWS command line interface.
struct Aws<'a> {
    served: &'a Served,
    program: PathBuf,
    variables: String,
    moto: Service,
}

impl<'a> Aws<'a> {
    fn start([program, server]: [PathBuf; 2], served: &'a Served) -> Aws<'a> {
        let [port] = free_ports();
        let moto = Service::start(
            served
                .program(server)
                .args(["-H", "127.0.0.1", "-p", &port.to_string()]),
            || is_served(port),
        );
        let variables = format!(
            "AWS_ENDPOINT_URL=http://127.0.0.1:{port} AWS_DEFAULT_REGION=eu-central-1 \
             AWS_ACCESS_KEY_ID=testing AWS_SECRET_ACCESS_KEY=testing"
        );
        let aws = Aws {
            served,
            program,
            variables,
            moto,
        };
        aws.shell(
            "id=$(aws kms create-key --query KeyMetadata.KeyId --output text)
             aws kms create-alias --alias-name alias/pg_rekey --target-key-id \"$id\"",
        );
        aws
    }

    /// A line for the shell, with `aws` in its PATH.
    fn shell(&self, line: &str) -> String {
        let pairs = self.variables.split(' ').map(|pair| pair.split_once('='));
        let line = format!("{}; {line}", path_with(&self.program));
        let mut shell = self.served.program("sh");
        let output = run(shell.envs(pairs.flatten()).args(["-c", &line]));
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }

    /// Puts a keyring in the script's file, as the head of the script says.
    fn encrypt(&self, keyring: &Path, context: &str) {
        self.shell(&format!(
            "aws kms encrypt --key-id alias/pg_rekey --plaintext fileb://{} \
             --encryption-context application={context} \
             --query CiphertextBlob --output text | base64 --decode > keyring.kms",
            keyring.display()
        ));
    }

    fn use_example(&self) {
        self.encrypt(&self.served.keyring, "pg_rekey");
        self.served.use_example(
            "aws-kms.sh",
            &format!(
                "{} {} KMS_KEYRING={}/keyring.kms",
                path_with(&self.program),
                self.variables,
                self.served.cluster.dir().display()
            ),
        );
        self.served.cluster.restart("fast");
    }
}

#[test]
fn aws_kms_gives_the_keyring_in_its_context_only_and_rotates() {
    let Some(programs) = fetched("aws-kms.sh", ["bin/aws", "bin/moto_server"]) else {
        return;
    };
    let served = Served::start();
    let aws = Aws::start(programs, &served);
    aws.use_example();
    let mut warm = served.connect();
    assert_eq!(warm.text(OPEN), "one");
    aws.encrypt(&served.keyring, "another");
    served.outlives(&mut warm, ("58000", "status 255"), || {
        aws.encrypt(&served.keyring, "pg_rekey");
    });
    let (more, new) = one_key_more(&served.keyring);
    let more = served.private("more.json", more);
    aws.encrypt(more.as_ref(), "pg_rekey");
    served.rotates_to(&new);
    let log = served.cluster.log();
    assert!(log.contains("InvalidCiphertextException"), "{log}");
    no_secret_is_logged(&served, &[]);
}

#[test]
fn the_log_says_that_an_aws_kms_hangs() {
    let Some(programs) = fetched("a hanging KMS", ["bin/aws", "bin/moto_server"]) else {
        return;
    };
    let served = Served::start();
    let aws = Aws::start(programs, &served);
    // Less than the command line interface would take if it tried as often as it likes to.
    let limit = "rekey.root_key_command_timeout = '20s'";
    served.cluster.append(limit);
    aws.use_example();
    let mut warm = served.connect();
    assert_eq!(warm.text(OPEN), "one");
    aws.moto.freeze();
    served.outlives(&mut warm, ("58000", "status 255"), || aws.moto.thaw());
    let log = served.cluster.log();
    assert!(log.contains("Read timeout on endpoint URL"), "{log}");
}

#[test]
fn google_cloud_kms_gives_the_keyring_to_a_decrypter() {
    let Some([gcloud, python]) = fetched("gcp-kms.sh", ["bin/gcloud", "bin/python"]) else {
        return;
    };
    let served = Served::start();
    let [port] = free_ports();
    let key = "projects/shop/locations/europe-west3/keyRings/databases/cryptoKeys/pg_rekey";
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("providers/gcp_kms.py");
    let script = served.private("gcp_kms.py", fs::read(script).expect("the stand-in"));
    let _kms = Service::start(
        served
            .program(python)
            .args([&script, &port.to_string(), key, "an-admin", "a-decrypter"]),
        || is_served(port),
    );
    let folder = served.cluster.dir().join("gcloud");
    fs::create_dir(&folder).expect("gcloud's folder");
    give_to_server(&folder);
    let aad = served.private("keyring.aad", "pg_rekey");
    let token = served.private("gcp-token", "an-admin");
    let variables = format!(
        "CLOUDSDK_CONFIG={} CLOUDSDK_CORE_PROJECT=shop CLOUDSDK_AUTH_ACCESS_TOKEN_FILE={token} \
         CLOUDSDK_API_ENDPOINT_OVERRIDES_CLOUDKMS=http://127.0.0.1:{port}/",
        folder.display()
    );
    // As the head of the script says.
    let encrypted = served.cluster.dir().join("keyring.gcp");
    let encrypt = |keyring: &Path, aad: &str| {
        served.private("gcp-token", "an-admin");
        let pairs = variables.split(' ').map(|pair| pair.split_once('='));
        let mut command = served.program(&gcloud);
        command
            .envs(pairs.flatten())
            .args(["kms", "encrypt"])
            .args([
                "--location=europe-west3",
                "--keyring=databases",
                "--key=pg_rekey",
                &format!("--additional-authenticated-data-file={aad}"),
                &format!("--plaintext-file={}", keyring.display()),
                &format!("--ciphertext-file={}", encrypted.display()),
            ]);
        run(&mut command);
        served.private("gcp-token", "a-decrypter");
    };
    encrypt(&served.keyring, &aad);
    let bytes = fs::read(&encrypted).expect("what gcloud wrote");
    let secret = secret_of(&fs::read(&served.keyring).expect("the keyring"));
    assert!(!String::from_utf8_lossy(&bytes).contains(&secret));
    served
        .cluster
        .append("rekey.root_key_command_timeout = '30s'");
    served.use_example(
        "gcp-kms.sh",
        &format!(
            "{} {variables} KMS_LOCATION=europe-west3 KMS_RING=databases KMS_KEYRING={} \
             KMS_AAD={aad}",
            path_with(&gcloud),
            encrypted.display()
        ),
    );
    served.cluster.restart("fast");
    let mut warm = served.connect();
    assert_eq!(warm.text(OPEN), "one");

    served.private("gcp-token", "nobody");
    served.outlives(&mut warm, ("58000", "status 1"), || {
        served.private("gcp-token", "a-decrypter");
    });
    encrypt(&served.keyring, &served.private("other.aad", "another"));
    served.outlives(&mut warm, ("58000", "status 1"), || {
        encrypt(&served.keyring, &aad);
    });
    let (more, new) = one_key_more(&served.keyring);
    encrypt(served.private("more.json", more).as_ref(), &aad);
    served.rotates_to(&new);
    // gcloud keeps logs of its own.
    let mut grep = Command::new("grep");
    let found = grep.args(["-rq", &secret]).arg(&folder).status();
    assert_eq!(found.expect("grep").code(), Some(1));
    let log = served.cluster.log();
    assert!(
        log.contains("Decryption failed: the ciphertext is invalid"),
        "{log}"
    );
    no_secret_is_logged(&served, &["a-decrypter", "an-admin"]);
}

/// A folder as systemd makes it for a unit with User=: that user's, mode 0500, its files 0400.
fn credentials(served: &Served, name: &str, keyring: &Path) -> PathBuf {
    let folder = served.cluster.dir().join(name);
    fs::create_dir(&folder).expect("a folder of credentials");
    let keyring = fs::read(keyring).expect("the keyring");
    served
        .cluster
        .write_file(&folder.join("pg_rekey"), &keyring, 0o400);
    give_to_server(&folder);
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o500)).expect("its mode");
    folder
}

#[test]
fn a_credential_of_the_unit_is_the_keyring_until_its_next_start() {
    let served = Served::start();
    let first = credentials(&served, "credentials", &served.keyring);
    // systemd has a folder for each start of a unit under one name.
    let now = served.cluster.dir().join("now");
    std::os::unix::fs::symlink(&first, &now).expect("a link");
    served.use_example(
        "systemd-credential.sh",
        &format!("CREDENTIALS_DIRECTORY={}", now.display()),
    );
    served
        .cluster
        .append("shared_preload_libraries = 'pg_rekey'");
    served.cluster.restart("fast");
    assert_eq!(served.connect().text(OPEN), "one");

    let (more, new) = one_key_more(&served.keyring);
    let more = served.private("more.json", more);
    served.cluster.stop("fast");
    fs::remove_file(&now).expect("the link removed");
    let second = credentials(&served, "credentials-again", more.as_ref());
    std::os::unix::fs::symlink(&second, &now).expect("a link");
    served.cluster.boot();
    served.rotates_to(&new);
    no_secret_is_logged(&served, &[]);
    for folder in [first, second] {
        fs::set_permissions(folder, fs::Permissions::from_mode(0o700)).expect("its mode");
    }
}

#[test]
fn a_server_outside_of_its_unit_is_told_that_it_has_no_credential() {
    let served = Served::start();
    served.use_example("systemd-credential.sh", "CREDENTIALS_DIRECTORY=");
    served.cluster.restart("fast");
    served.connect().refuse(OPEN, "58000").names("status 2");
    let log = served.cluster.log();
    assert!(
        log.contains("is set by systemd for units with a credential"),
        "{log}"
    );
}

#[test]
fn systemd_creds_makes_a_credential_that_only_its_name_opens() {
    if !rekey_tests::cluster::is_root() || Command::new("systemd-creds").output().is_err() {
        eprintln!("skipped: systemd-creds needs to be installed, and root");
        return;
    }
    let served = Served::start();
    // A key of the host that is none of this host's.
    let dir = served.cluster.dir();
    let creds = |args: &[&str]| {
        let mut command = Command::new("systemd-creds");
        command
            .env("SYSTEMD_CREDENTIAL_SECRET", dir.join("host.secret"))
            .args(args);
        command.output().expect("systemd-creds")
    };
    let encrypted = dir.join("encrypted").display().to_string();
    let keyring = served.keyring.display().to_string();
    assert!(creds(&["setup"]).status.success());
    let encrypt = ["encrypt", "--with-key=host", "--name=pg_rekey"];
    assert!(
        creds(&[&encrypt[..], &[&keyring, &encrypted]].concat())
            .status
            .success()
    );
    assert!(
        !creds(&["decrypt", "--name=other", &encrypted, "-"])
            .status
            .success()
    );
    let decrypted = creds(&["decrypt", "--name=pg_rekey", &encrypted, "-"]).stdout;
    assert!(decrypted == fs::read(&keyring).expect("the keyring"));
}
