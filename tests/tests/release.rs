//! What a release says about itself: META.json keeps the specification of PGXN's metadata 1.0.0, and
//! every file that names the version names the same one, and the tests that docs/invariants.md
//! names are there. Needs no server.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn file(name: &str) -> String {
    fs::read_to_string(root().join(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

fn meta() -> Value {
    serde_json::from_str(&file("META.json")).expect("META.json is JSON")
}

/// The version of a Cargo.toml's own package.
fn package_version(manifest: &str) -> String {
    let text = file(manifest);
    let line = text
        .lines()
        .skip_while(|line| *line != "[package]")
        .find(|line| line.starts_with("version = "))
        .unwrap_or_else(|| panic!("{manifest} has no version"));
    line.split('"').nth(1).expect("a quoted version").to_owned()
}

/// A non-empty string of the metadata.
fn text<'a>(value: &'a Value, name: &str) -> &'a str {
    let text = value[name].as_str().unwrap_or_default();
    assert!(!text.is_empty(), "META.json: {name} is not a text");
    text
}

fn is_semantic(version: &str) -> bool {
    let parts: Vec<&str> = version.split('.').collect();
    parts.len() == 3
        && parts
            .iter()
            .all(|part| part.parse::<u32>().is_ok_and(|n| n.to_string() == *part))
}

/// The invariants of docs/invariants.md.
const INVARIANTS: usize = 15;

#[test]
fn every_invariant_names_tests_that_exist() {
    let page = file("docs/invariants.md");
    let mut sections = page.split("\n## I").skip(1);
    for number in 1..=INVARIANTS {
        let section = sections.next().expect("a section for each invariant");
        assert!(section.starts_with(&format!("{number}. ")), "I{number}");
        let names = section.split('`').skip(1).step_by(2);
        let names: Vec<(&str, &str)> = names.filter_map(|name| name.split_once("::")).collect();
        assert!(!names.is_empty(), "I{number} names no test");
        for (stem, test) in names {
            let folders = ["tests/tests", "core/tests", "pg_test"];
            let found = folders.iter().any(|folder| {
                let text = fs::read_to_string(root().join(folder).join(format!("{stem}.rs")));
                text.is_ok_and(|text| text.contains(&format!("fn {test}(")))
            });
            assert!(found, "I{number}: there is no test {stem}::{test}");
        }
    }
    assert!(sections.next().is_none(), "no other section");
}

#[test]
fn one_version_is_named_everywhere() {
    let version = package_version("Cargo.toml");
    for manifest in ["core/Cargo.toml", "tests/Cargo.toml", "fuzz/Cargo.toml"] {
        assert_eq!(package_version(manifest), version, "{manifest}");
    }
    let meta = meta();
    assert_eq!(text(&meta, "version"), version);
    assert_eq!(text(&meta["provides"]["pg_rekey"], "version"), version);
    assert!(
        file("pg_rekey.control").contains("default_version = '@CARGO_VERSION@'"),
        "the control file takes its version from Cargo.toml"
    );
    let changelog = file("CHANGELOG.md");
    let latest = changelog
        .lines()
        .find_map(|line| line.strip_prefix("## "))
        .expect("a version in CHANGELOG.md");
    assert_eq!(latest.split(' ').next(), Some(version.as_str()));
}

#[test]
fn what_is_released_is_dated_and_what_is_not_says_so() {
    let version = package_version("Cargo.toml");
    let sums = fs::read_to_string(root().join("sql/released/SHA256SUMS")).unwrap_or_default();
    let released = sums.contains(&format!("pg_rekey--{version}.sql"));
    let changelog = file("CHANGELOG.md");
    let says_unreleased = changelog.contains(&format!("## {version} (unreleased)"));
    assert_ne!(released, says_unreleased, "CHANGELOG.md and sql/released/");
    let status = meta()["release_status"].as_str().map(str::to_owned);
    if !released {
        assert_ne!(status.as_deref(), Some("stable"));
    }
}

#[test]
fn the_metadata_keeps_its_specification() {
    let meta = meta();
    for required in ["name", "abstract", "version"] {
        text(&meta, required);
    }
    let name = text(&meta, "name");
    assert!(name.len() >= 2 && !name.contains(['/', '\\', ' ']));
    assert!(is_semantic(text(&meta, "version")));
    assert!(is_semantic(text(&meta["meta-spec"], "version")));
    let maintainers = meta["maintainer"].as_array().expect("maintainer is a list");
    assert!(!maintainers.is_empty() && maintainers.iter().all(Value::is_string));

    // The names that the specification gives to the two licences of LICENSE.
    assert_eq!(meta["license"], serde_json::json!(["mit", "apache_2_0"]));
    let license = file("LICENSE");
    assert!(license.contains("MIT License") && license.contains("Apache License"));

    let provides = meta["provides"].as_object().expect("provides is a map");
    assert!(!provides.is_empty());
    for (name, extension) in provides {
        assert!(is_semantic(text(extension, "version")), "{name}");
        for named in [text(extension, "file"), text(extension, "docfile")] {
            assert!(root().join(named).is_file(), "{name}: {named} is missing");
        }
    }

    for (phase, relations) in meta["prereqs"].as_object().expect("prereqs is a map") {
        assert!(
            ["configure", "build", "test", "runtime", "develop"].contains(&phase.as_str()),
            "{phase}"
        );
        for (relation, packages) in relations.as_object().expect("a map of relations") {
            assert!(
                ["requires", "recommends", "suggests", "conflicts"].contains(&relation.as_str()),
                "{relation}"
            );
            for (package, version) in packages.as_object().expect("a map of packages") {
                let version = version.as_str().unwrap_or_default();
                assert!(is_semantic(version), "{package} {version}");
            }
        }
    }
    // The oldest server of prereqs is the oldest that Cargo.toml has a feature for.
    let oldest = file("Cargo.toml")
        .lines()
        .filter_map(|line| line.strip_prefix("pg")?.split_once(" = ")?.0.parse().ok())
        .min()
        .map(|major: u32| format!("{major}.0.0"));
    assert_eq!(
        meta["prereqs"]["runtime"]["requires"]["PostgreSQL"].as_str(),
        oldest.as_deref()
    );

    let status = text(&meta, "release_status");
    assert!(["stable", "testing", "unstable"].contains(&status));
    let tags = meta["tags"].as_array().expect("tags is a list");
    assert!(tags.iter().all(|tag| {
        tag.as_str()
            .is_some_and(|t| t.len() < 256 && !t.contains('/'))
    }));
    let known = [
        "name",
        "version",
        "abstract",
        "description",
        "maintainer",
        "license",
        "provides",
        "meta-spec",
        "generated_by",
        "no_index",
        "prereqs",
        "release_status",
        "resources",
        "tags",
    ];
    for key in meta.as_object().expect("a map").keys() {
        assert!(known.contains(&key.as_str()), "{key} is no key of it");
    }
}
