-- One customer calls: e-mail, notes and salary change. pgbench runs this as shop_app.
\set id random(1, 200000)
UPDATE customers
SET rev = rev + 1,
    email_c = encrypt_col(customer_email(id, rev + 1), 'pii',
                           rekey.context('customer.email', id::text)),
    notes_c = encrypt_col(customer_notes(id, rev + 1), 'pii',
                           rekey.context('customer.notes', id::text)),
    salary_c = encrypt_col(customer_salary(id, rev + 1), 'pii',
                           rekey.context('customer.salary', id::text))
WHERE id = :id;
