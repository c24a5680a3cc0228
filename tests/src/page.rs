//! Pages of docs/ whose SQL a test runs, so that no page promises what the server does not do.
//!
//! A ```sql block goes through psql as a reader would paste it, in a session of its own. A ```text
//! block directly below it, unless a line `<!-- the output … -->` above excuses it, must be what psql prints, but for what differs from run to run: ids,
//! times, positions, pids, the width of columns. A text that begins with ERROR, NOTICE or WARNING is
//! compared with psql's messages, and only a block above an ERROR may fail, and must. A test steps
//! through a page and acts in between; it fails when a block of the page was not run.
//!
//! `REKEY_WRITE_PAGES=1` writes what psql prints into the page instead of comparing it: read it then.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use crate::{Cluster, PATIENCE};

/// Where the root keys lie in the documents.
const KEYRING: &str = "/etc/pg_rekey/root.json";

/// A page and how far it was run.
#[derive(Debug)]
pub struct Page {
    path: String,
    blocks: Vec<Block>,
    next: usize,
    folder: Option<PathBuf>,
}

#[derive(Debug)]
struct Block {
    line: usize,
    sql: String,
    text: Option<String>,
}

impl Page {
    /// Reads a page, named by its path below docs/.
    pub fn open(path: &str) -> Page {
        let text = fs::read_to_string(docs().join(path)).expect("a page of docs/");
        let blocks = blocks(&text);
        assert!(!blocks.is_empty(), "{path} has no sql blocks");
        Page {
            path: path.to_owned(),
            blocks,
            next: 0,
            folder: None,
        }
    }

    /// Runs the next block. Files that blocks write lie in the folder of the first cluster.
    pub fn step(&mut self, cluster: &Cluster, database: &str) {
        let path = &self.path;
        let block = self.blocks.get(self.next).unwrap_or_else(|| {
            panic!("{path} has {} sql blocks, a test wants more", self.next);
        });
        let folder = self.folder.get_or_insert_with(|| cluster.dir().to_owned());
        let place = format!("docs/{path}:{}", block.line);
        let promised = block.text.as_deref().unwrap_or_default();
        let says = ["ERROR:", "NOTICE:", "WARNING:"];
        let of_messages = says.iter().any(|word| promised.starts_with(word));
        let may_fail = promised.starts_with("ERROR:");
        let (done, printed, messages) = run(cluster, database, folder, &block.sql);
        assert_eq!(
            done, !may_fail,
            "{place}\n{}\n{printed}{messages}",
            block.sql
        );
        let real = if of_messages { &messages } else { &printed };
        if block.text.is_some() && plain(promised) != plain(real) {
            let write = std::env::var_os("REKEY_WRITE_PAGES").is_some();
            assert!(
                write,
                "{place} promises\n{promised}\nand psql prints\n{real}"
            );
            write_text(path, block, promised, real);
        }
        self.next += 1;
    }

    /// Runs the next blocks, as many as `count`.
    pub fn steps(&mut self, count: usize, cluster: &Cluster, database: &str) {
        for _ in 0..count {
            self.step(cluster, database);
        }
    }

    /// Runs all blocks that are left.
    pub fn rest(mut self, cluster: &Cluster, database: &str) {
        while self.next < self.blocks.len() {
            self.step(cluster, database);
        }
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            let (done, all) = (self.next, self.blocks.len());
            assert_eq!(done, all, "blocks of {} were not run", self.path);
        }
    }
}

/// The folder of the documents.
pub fn docs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs")
}

/// Whether psql ran through, what it printed, and its messages without their places in the script.
fn run(cluster: &Cluster, database: &str, folder: &Path, sql: &str) -> (bool, String, String) {
    let script = cluster.dir().join("block.sql");
    let content = format!("\\cd {}\n{sql}", folder.display());
    cluster.write_file(&script, content.as_bytes(), 0o600);
    let script = script.to_str().expect("a path in UTF-8");
    let arguments = "-Xq -P pager=off -v ON_ERROR_STOP=1";
    let mut arguments: Vec<&str> = arguments.split(' ').collect();
    arguments.extend(["-d", database, "-f", script]);
    let keyring = cluster.root_key_file().display().to_string();
    let deadline = Instant::now() + PATIENCE;
    loop {
        let output = cluster.try_tool("psql", &arguments, "");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).replace(&keyring, KEYRING);
        let (printed, messages) = (text(&output.stdout), text(&output.stderr));
        let prefix = format!("psql:{script}:");
        let messages: Vec<&str> = messages
            .lines()
            .map(|line| line.strip_prefix(&prefix).unwrap_or(line))
            .map(|line| line.trim_start_matches(|c: char| c.is_ascii_digit()))
            .map(|line| line.strip_prefix(": ").unwrap_or(line))
            .collect();
        let messages = messages.join("\n");
        // Some transaction of the server's own may be under way, as on any server.
        if !messages.contains("Older transactions still run") || Instant::now() > deadline {
            return (output.status.success(), printed, messages);
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
}

/// Puts the real output in the place of the promised one.
fn write_text(path: &str, block: &Block, promised: &str, real: &str) {
    let file = docs().join(path);
    let real: String = real
        .trim_end()
        .lines()
        .map(|line| format!("{}\n", line.trim_end()))
        .collect();
    let page = fs::read_to_string(&file).expect("a page");
    let found = format!("```sql\n{}```\n```text\n{promised}```", block.sql);
    let wanted = format!("```sql\n{}```\n```text\n{real}```", block.sql);
    fs::write(&file, page.replacen(&found, &wanted, 1)).expect("the page written");
}

fn blocks(text: &str) -> Vec<Block> {
    let mut blocks: Vec<Block> = Vec::new();
    let mut lines = text.lines().enumerate();
    let (mut may_promise, mut excused) = (false, false);
    while let Some((number, line)) = lines.next() {
        let Some(kind) = line.strip_prefix("```") else {
            may_promise &= line.trim().is_empty();
            excused = line.starts_with("<!-- the output") || excused && line.trim().is_empty();
            continue;
        };
        let body: String = lines
            .by_ref()
            .map(|(_, line)| line)
            .take_while(|line| !line.starts_with("```"))
            .flat_map(|line| [line, "\n"])
            .collect();
        match kind.trim() {
            "sql" => blocks.push(Block {
                line: number + 1,
                sql: body,
                text: None,
            }),
            "text" if may_promise => {
                if let Some(block) = blocks.last_mut() {
                    block.text = Some(body);
                }
            }
            _ => {}
        }
        may_promise = kind.trim() == "sql" && !std::mem::take(&mut excused);
    }
    blocks
}

/// A text without what differs from run to run.
fn plain(text: &str) -> Vec<String> {
    let line = |line: &str| {
        let mut after_pid = false;
        let words = line.split(|c: char| c.is_whitespace() || c == '|');
        let words = words.map(|word| word.trim_end_matches('+').trim_matches('-'));
        let words =
            words.filter(|word| !word.is_empty() && !word.chars().all(|c| "-+".contains(c)));
        let words = words.map(|word| {
            let bare = word.trim_matches(|c: char| "\"'(),.;".contains(c));
            let masked = if after_pid || varies(bare) {
                word.replace(bare, "~")
            } else {
                word.to_owned()
            };
            after_pid = bare == "pid";
            masked
        });
        words.collect::<Vec<_>>().join(" ")
    };
    let lines = text.lines().map(line);
    lines.filter(|line| !line.is_empty()).collect()
}

fn varies(word: &str) -> bool {
    let bytes = word.as_bytes();
    let all = |set: &str| !word.is_empty() && word.chars().all(|c| set.contains(c));
    let id = bytes.len() >= 12 && all("0123456789");
    let root_id = bytes.len() == 32 && all("0123456789abcdef");
    let date = bytes.len() >= 10 && bytes[4] == b'-' && bytes[7] == b'-' && all("0123456789-:.+TZ");
    let time = bytes.len() >= 8 && bytes[2] == b':' && bytes[5] == b':' && all("0123456789:.+");
    let position = word
        .split_once('/')
        .is_some_and(|(high, low)| all("0123456789ABCDEF/") && !high.is_empty() && !low.is_empty());
    id || root_id || date || time || position
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_come_with_the_text_directly_below() {
        let page = "<!-- the output is old -->\n```sql\nSELECT 0;\n```\n```text\nold\n```\n\
                    x\n```sql\nSELECT 1;\n```\n\n```text\none\n```\n```text\nstray\n```\n\
                    ```sql\nSELECT 2;\n```\nprose\n```text\nfar\n```\n";
        let found = blocks(page);
        assert_eq!(found.len(), 3);
        assert_eq!(found[0].text, None, "excused");
        assert_eq!((found[1].line, found[1].sql.as_str()), (9, "SELECT 1;\n"));
        assert_eq!(found[1].text.as_deref(), Some("one\n"));
        assert_eq!(found[2].text, None);
    }

    #[test]
    fn only_what_differs_from_run_to_run_is_overlooked() {
        let one = " slot | at\n---+--\n 123456789012345 | 2026-01-02 03:04:05.6+00\n(1 row)\n";
        let two = " slot |  at \n----+---\n  998877665544332 | 2027-11-12 13:14:15+00\n(1 row)\n\n";
        assert_eq!(plain(one), plain(two));
        assert_ne!(plain(one), plain(&two.replace("(1 row)", "(2 rows)")));
        assert_ne!(plain(" state\n active"), plain(" state\n previous"));
        assert_eq!(plain("waits for pid 12"), plain("waits for pid 7"));
        assert_ne!(plain("waits for pid 12"), plain("waits for 7"));
    }
}
