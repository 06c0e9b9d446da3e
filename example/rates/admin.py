from django.contrib import admin

from rates.models import Rate

admin.site.register(Rate)
